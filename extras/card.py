"""
What a run is going to take, before it takes it: printed when a run begins, and by

    python train.py config/train_gpt2.py --dry_run=True --gpus=8xH100 --dollars_per_gpu_hour=3
"""
from pathlib import Path

import torch

from data.files import extra, say
from data.models import flops_per_token
from data.runs import step_tokens

gpus = ''                    # print the hours that the run takes on these, such as 8xH100
share_of_peak = 0.4          # of their FLOP/s that the run is assumed to reach; from 0.01 to 1
dollars_per_gpu_hour = 0.0   # for the cost; 0: none is printed; at least 0


def show(run, origin):
    """Print the card. origin: {setting: the layer that set it}; the model may be on no device."""
    c, config, lines = run.model.config, run.config, []
    flops, tokens = flops_per_token(run.model, config['block_size']), step_tokens(config)
    weights, state, work, whole_state = memory(run)
    total, known = config['max_iters'] * tokens, run.meta['tokens']
    if run.stage.samples:
        step = (f'{config["num_prompts"]} questions, {config["num_samples"]} answers of '
                f'{config["max_new_tokens"]} tokens at most')
        whole = f'{config["max_iters"] * config["num_prompts"] * config["num_samples"]:,} answers'
    else:
        step = (f'{tokens:,} tokens: {config["gradient_accumulation_steps"]} x '
                f'{config["batch_size"]} rows of {config["block_size"]}')
        epochs = f'{total / known:.2f} epochs of {known:,} tokens' if known else (
            'data of unknown length')
        whole = f'{total:,} tokens, {flops * total:.1e} FLOPs, {epochs}'
    hidden, _, _ = run.model.parameter_groups(config['muon_lr'] > 0)
    say(f"""{config['stage']} on {config['dataset']} from {config['init_from']}, into \
{config['out_dir']}
  model       {parameters(run.model) / 1e6:.2f}M parameters{experts(run.model)}, {c.n_layer} \
layers, {c.n_embd} wide, {c.n_head} heads ({c.n_kv_head} for keys); {flops / 1e6:.1f} MFLOPs per \
token
  a step      {step}
  the run     {config['max_iters']:,} steps, {whole}
  memory      about {(weights + state + work) / 1e9:.2f} GB: {weights / 1e9:.2f} weights and \
gradients, {state / 1e9:.2f} optimizer, {work / 1e9:.2f} activations
  checkpoint  {(4 * parameters(run.model) + whole_state) / 1e6:.1f} MB, and as much for the best one
  machine     {run.world} x {run.device}, {str(run.dtype)[6:]}, compile={config["compile"]}, \
{'Muon and AdamW' if hidden else 'AdamW'}""")
    if gpus:
        more = ''
        if run.stage.samples:
            total = config['max_iters'] * config['num_prompts'] * config['num_samples']
            total *= config['max_new_tokens']
            more = ', to learn from answers as long as may be; to write them is not counted'
        say(f'  {gpus:<10}  {price(flops * total)}{more}')
    for layer in dict.fromkeys(origin.values()):
        names = [name for name in origin if origin[name] == layer]
        lines.append(f'  settings    of {layer}: {", ".join(names)}')
    say('\n'.join(lines))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def experts(model):
    """-> of a mixture of experts, how many parameters are at work for a token"""
    c, active = model.config, sum(getattr(m, 'active_weights', 0) for m in model.modules())
    idle = active * (c.n_expert - c.n_expert_active) // c.n_expert_active
    working = (parameters(model) - idle) / 1e6
    return f' ({working:.2f}M at work: {c.n_expert_active} of {c.n_expert} experts)' * bool(active)


def memory(run):
    """-> bytes in a process of weights and gradients, of the optimizers' state, of activations; of
    the whole state"""
    c, config, size = run.model.config, run.config, 4 if run.dtype == torch.float32 else 2
    # A token keeps 18 activations of width C in a layer (counted; 16 in GPT-2's) and backward needs
    # a few more; of its logits there are two in this precision and two in fp32.
    rows = config['batch_size'] * config['block_size']
    hidden = run.model.transformer.h[0].mlp.c_fc.weight.shape[-2]
    if c.n_expert:
        hidden *= c.n_expert_active + c.n_expert_shared
    kept = c.n_layer * (14 * c.n_embd + 2 * hidden)
    if config['recompute']:     # of each layer what goes in, all of the one at work
        kept = kept // c.n_layer + c.n_layer * c.n_embd
    work = rows * (kept * size + c.table_rows * (2 * size + 8))
    learned = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    weights = 4 * (parameters(run.model) + learned)     # a gradient for what learns
    if run.stage.samples:   # the policy's copy of the weights, keys and values
        weights += parameters(run.model) * size if size == 2 else 0
        count = config['num_prompts'] * config['num_samples'] // max(run.world, gpu_count())
        answers = min(config['rollout_rows'], count)
        work += answers * config['block_size'] * size * (
            2 * c.n_layer * c.n_kv_head * c.head_width)
    if run.stage.reference:
        weights += 4 * reference_parameters(run)
    hidden, _, _ = run.model.parameter_groups(config['muon_lr'] > 0)
    state = 4 * (2 * learned - sum(p.numel() for p in hidden))
    parts = max(run.world, gpu_count()) if config['shard'] else 1
    return weights / parts, state / parts, work, state


def reference_parameters(run):
    """Of the frozen model that the run compares with: this one's, or the teacher's."""
    folder = Path(run.config.get('teacher', ''))
    if (folder / 'config.json').exists():   # a published one: by its files, in two bytes or four
        files = sum(path.stat().st_size for path in folder.glob('*.safetensors'))
        half = 'float16' in (folder / 'config.json').read_text(encoding='utf-8')
        return files // (2 if half else 4)
    path = next((path for path in (folder, folder / 'best.pt', folder / 'ckpt.pt')
                 if path.suffix == '.pt' and path.exists()), None)
    if path is None:
        return parameters(run.model)
    tensors = torch.load(path, mmap=True, map_location='cpu', weights_only=True)['model']
    return sum(p.numel() for p in {p.data_ptr(): p for p in tensors.values()}.values())


def gpu_count():
    """-> 8 of '8xH100', 1 of 'H100', 0 of what is neither"""
    count, x, _ = gpus.rpartition('x')
    return int(count) if count.isdecimal() else int(not x)


def price(flops):
    """-> hours, and dollars, of so many FLOPs on `gpus`"""
    machine = extra('machine')
    count, name = gpu_count(), gpus.rpartition('x')[2]
    peak = machine.GPU_FLOPS.get(name) if machine and count else None
    if not peak:
        raise ValueError(f'--gpus={gpus}: write a number and a GPU of extras/machine.py: 8xH100')
    hours = flops / (count * peak * share_of_peak) / 3600
    text = (f'{hours:,.2f} hours at {share_of_peak:.0%} of the peak of '
            f'{peak / 1e12:,.0f} TFLOP/s each (an assumption: --share_of_peak=)')
    if dollars_per_gpu_hour:
        text += f', {hours * count * dollars_per_gpu_hour:,.0f} dollars'
    return text
