"""Pictures of runs: loss.png of one, stages.png of several that followed each other."""
from pathlib import Path

import numpy as np

from data.runs import read_log

PANELS = [('loss', 'val_loss'), ('reward', 'accuracy')]     # a line and dots in each


def points(log, key, began):
    """-> minutes and values of key in a log. A weighted sum of log p, as RL's, is no loss: none"""
    weighted = any({'reward', 'reward_gap'} & line.keys() for line in log)
    lines = [] if key == 'loss' and weighted else [
        line for line in log if isinstance(line.get(key), int | float)]
    return [began + line['seconds'] / 60 for line in lines], [line[key] for line in lines]


def draw(folders, target, title, accuracies=()):
    """
    Draw the logs of runs one after the other, over minutes of training: losses, and rewards and
    accuracy if there are any. accuracies: a star for each run, at its end.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    logs = [read_log(folder) for folder in folders]
    minutes = [log[-1]['seconds'] / 60 if log else 0.0 for log in logs]
    ends = np.cumsum(minutes)
    answered = accuracies or any('accuracy' in line for log in logs for line in log)
    panels = PANELS if answered else PANELS[:1]
    figure, axes = pyplot.subplots(len(panels), figsize=(7, 3.5 * len(panels)), sharex=True,
                                   squeeze=False)
    axes = axes[:, 0]
    for axis, keys in zip(axes, panels, strict=True):
        for key, style, colour in zip(keys, ('-', 'o-'), ('C0', 'C1'), strict=True):
            axis.plot([], style, color=colour, markersize=3, label=key)
            for log, began in zip(logs, ends - minutes, strict=True):
                axis.plot(*points(log, key, began), style, color=colour, markersize=3)
        axis.legend()
    for folder, end, accuracy in zip(folders, ends, accuracies):
        axes[1].plot(end, accuracy, 'k*', markersize=10)
        axes[1].annotate(f'{Path(folder).name}: {accuracy:.1%}', (end, accuracy), rotation=30)
    axes[0].set(title=title, ylabel='loss (nats per token)',
                yscale='log' if len(logs) > 1 else 'linear')
    axes[-1].set(xlabel='minutes of training')
    if answered:
        axes[1].set(ylabel='share of correct answers', ylim=(0, 1.1))
    figure.savefig(target, dpi=100, bbox_inches='tight')
    pyplot.close(figure)
