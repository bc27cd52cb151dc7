"""
Weights, gradients and the optimizers' state sharded across the processes, with PyTorch's FSDP2
(arXiv:1910.02054, 2304.11277), for models that do not fit into one GPU:

    torchrun --standalone --nproc_per_node=8 train.py --depth=24 config/depth.py --shard=True

Each process keeps its part of every parameter, in fp32. A block's weights are gathered (in bf16,
where that is the precision) just before it computes, and the next block's meanwhile; its gradients
are summed and sharded behind it. Code that makes a different number of forward passes in each
process, as a rollout or a sample does, needs a whole model on its device: gather() makes one. Where
that does not fit, train with --sample_tokens=0 and --checkpoint=sharded.
"""
import pickle
import warnings
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from data.files import PlainUnpickler

# A checkpoint of parts may well be read or written by one process; logits are a view of more.
warnings.filterwarnings('ignore', 'torch.distributed is disabled|FSDP2-wrapped module')


def shard_model(model, precision):
    """Shard the parameters of a model in place, and move them to this process' device."""
    dtype = torch.bfloat16 if precision == torch.bfloat16 else None
    for block in model.transformer.h:   # under autocast: what goes in and out keeps its precision
        fully_shard(block, mp_policy=MixedPrecisionPolicy(dtype, torch.float32,
                                                          cast_forward_inputs=False))
    fully_shard(model)


def share_matrices(optimizers):
    """Let Muon orthogonalize each matrix in one process, which gets the rows of it from all."""
    def share(orthogonalize):
        def in_turn(X):
            """X: (matrices, rows, columns), each process has a part of the rows of all"""
            mine = X.redistribute(placements=[Shard(0)])
            done = DTensor.from_local(orthogonalize(mine.to_local()), X.device_mesh, [Shard(0)],
                                      shape=mine.shape, stride=mine.stride())
            return done.redistribute(placements=X.placements)
        return in_turn

    for optimizer in optimizers:
        if hasattr(optimizer, 'orthogonalize'):
            optimizer.orthogonalize = share(optimizer.orthogonalize)


def gather(model, GPT):
    """-> in each process a whole copy of a sharded model (a GPT). All of them must call it."""
    with torch.device('meta'):
        copy = GPT(model.config)
    copy = copy.to_empty(device=model.rope.device)
    copy.load_state_dict(full_tensors(model.state_dict()))
    copy.rope.copy_(model.rope)
    return copy.train(model.training)


def full_tensors(tree, here=True):
    """Dicts and lists with sharded tensors -> the same with whole ones, on the CPU, in processes
    that say here (elsewhere None). All of them must call it."""
    if isinstance(tree, dict):
        return {key: full_tensors(value, here) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [full_tensors(value, here) for value in tree]
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
        return tree.cpu() if here else None
    return tree


def sharded_state(state, optimizer):
    """An optimizer's state dict with whole tensors -> the same with this process' parts"""
    params = [p for group in optimizer.param_groups for p in group['params']]

    def part(value, p):
        if not torch.is_tensor(value) or value.shape != p.shape:    # AdamW's count of steps
            return value
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)

    return {**state, 'state': {i: {name: part(value, params[i]) for name, value in values.items()}
                               for i, values in state['state'].items()}}


class IndexUnpickler(PlainUnpickler):
    """Reads a checkpoint's index, which torch pickles: shapes and places, nothing else is made."""
    KNOWN = {
        'torch.distributed.checkpoint.metadata': (
            'BytesStorageMetadata', 'ChunkStorageMetadata', 'Metadata', 'MetadataIndex',
            'StorageMeta', 'TensorProperties', 'TensorStorageMetadata', '_MEM_FORMAT_ENCODING'),
        'torch.distributed.checkpoint.filesystem': ('_StorageInfo',), 'torch': ('Size',),
        'torch.serialization': ('_get_layout',)}

    def find_class(self, module, name):
        if module.split('.')[0] == 'pathlib' and name in ('PosixPath', 'WindowsPath'):
            return PurePath     # where it was written, on whatever system
        is_dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        known = is_dtype or name in self.KNOWN.get(module, ())
        return (pickle.Unpickler if known else PlainUnpickler).find_class(self, module, name)


class Reader(dcp.FileSystemReader):

    def read_metadata(self, *how, **more):
        with open(Path(self.path, '.metadata'), 'rb') as file:
            metadata = IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(dcp.DefaultLoadPlanner):

    def load_bytes(self, read_item, value):     # torch would unpickle whatever it is
        raise RuntimeError(f'refused: {read_item.dest_index.fqn} is no tensor')


def read_index(folder):
    """-> {name of a tensor in a checkpoint of parts: its shape}. ValueError if it is damaged"""
    try:
        index = Reader(str(folder)).read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in index.items()}
    except Exception as error:      # a damaged pickle can fail with any
        raise ValueError(damage(folder, error)) from None


def damage(folder, error):
    why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return f'{folder}: a part is missing or damaged ({why})'


def save_parts(model, optimizers, folder):
    """Write a checkpoint to a folder, each process its own parts; any number may read them. Only
    tensors are written: rates and the like are settings."""
    names = {p: name for name, p in model.named_parameters()}
    state = {names[p]: values for optimizer in optimizers for p, values in optimizer.state.items()}
    dcp.save({'model': model.state_dict(), 'optimizer': state}, checkpoint_id=str(folder),
             no_dist=not dist.is_initialized())


def load_parts(model, optimizers, folder):
    """Read such a checkpoint into a model, sharded or not, and its optimizers (): the model alone.
    ValueError says what is wrong with it."""
    content, names = {'model': model.state_dict()}, dict(model.named_parameters())
    for key, shape in read_index(folder).items() if optimizers else ():
        kind, name, what = key.split('.')[0], *key.partition('.')[2].rpartition('.')[::2]
        if kind == 'optimizer' and name in names:
            p = names[name]
            value = torch.zeros_like(p) if shape == p.shape else torch.zeros(shape)
            content.setdefault('optimizer', {}).setdefault(name, {})[what] = value
    try:
        dcp.load(content, storage_reader=Reader(str(folder)), planner=Planner(),
                 no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, OSError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(damage(folder, error)) from None
    model.load_state_dict(content['model'])
    for optimizer in optimizers:
        for p in [p for group in optimizer.param_groups for p in group['params']]:
            name = next(name for name, other in names.items() if other is p)
            optimizer.state[p] = content.get('optimizer', {}).get(name, {})
