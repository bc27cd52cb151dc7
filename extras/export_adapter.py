"""
What a run with --lora_rank learned, as PEFT reads it (of GPT-2's block: export the whole model).

    python -m extras.export_adapter --out_dir=out --to=adapter
"""
import json
from pathlib import Path

from torch import nn

from configurator import configure
from data.files import program, write
from data.models import load_model, read_checkpoint

out_dir = 'out'         # the run
to = ''                 # the folder to write


def export_adapter(checkpoint, model, folder):
    """Write the A and B of a checkpoint of a model as PEFT reads them."""
    from safetensors.torch import save_file

    from extras.export import architecture_of
    from extras.open_weights import places, turn
    base = architecture_of(model.config)
    if base == 'GPT2LMHeadModel':
        raise ValueError(f'{base}: its c_attn is one matrix in PEFT, turned; export the merged '
                         'model with extras.export')
    parts, tensors, names = checkpoint['lora'], {}, set()
    for name, layer in parts.items():   # B has W's rows: so their places are found by W's
        model.get_submodule(name).weight = nn.Parameter(layer['lora_B'])
    owners = {'attn.c_attn': ('q_proj', 'k_proj', 'v_proj'), 'attn.c_proj': ('o_proj',),
              'mlp.c_fc': ('gate_proj', 'up_proj', 'fc1'), 'mlp.c_proj': ('down_proj', 'fc2')}
    for theirs, (part, turned) in places(model).items():
        *path, short, kind = theirs.split('.')
        for ours, shorts in owners.items():
            layer = short in shorts and parts.get(f'transformer.h.{path[2]}.{ours}')
            if layer and kind == 'weight':
                path = 'base_model.model.' + theirs.removesuffix('.weight')
                tensors[f'{path}.lora_A.weight'] = layer['lora_A'].clone()
                B = turn(part, model.config.head_width) if turned else part
                tensors[f'{path}.lora_B.weight'] = B.detach().contiguous().clone()
                names.add(short)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
    config = checkpoint['config']
    write(folder / 'adapter_config.json', json.dumps({
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': config['lora_rank'],
        'lora_alpha': config['lora_alpha'], 'target_modules': sorted(names), 'bias': 'none',
        'lora_dropout': 0.0, 'inference_mode': True, 'fan_in_fan_out': False,
        'base_model_name_or_path': None}, indent=1).encode())


def main():
    configure(globals())
    if not to or Path(to).exists() and any(Path(to).iterdir()):
        raise ValueError(f'--to={to}: name a folder that is not there yet')
    model, _, _ = load_model(out_dir)
    path = Path(out_dir)
    if path.suffix != '.pt':    # as load_model() chooses
        path = path / ('best.pt' if (path / 'best.pt').exists() else 'ckpt.pt')
    checkpoint = read_checkpoint(path)
    if 'lora' not in checkpoint:
        raise ValueError(f'{path}: that run had no --lora_rank')
    export_adapter(checkpoint, model, to)


if __name__ == '__main__':
    program(main)
