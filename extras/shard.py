"""
Weights, gradients and the optimizers' state shared out among the processes, with PyTorch's FSDP2
(arXiv:1910.02054, 2304.11277), for models that do not fit into one GPU:

    torchrun --standalone --nproc_per_node=8 train.py --depth=24 config/depth.py --shard=True

Each process keeps its part of every parameter, in fp32. A block's weights are gathered (in bf16,
where that is the precision) just before it computes, and the next block's meanwhile; its gradients
are summed and shared out behind it. Whoever makes another number of forward passes than the other
processes, as a rollout does, needs a whole model: gather() makes one.
"""
import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

# A checkpoint of parts may well be read or written by one process.
warnings.filterwarnings('ignore', 'torch.distributed is disabled')


def shard_model(model, precision):
    """Share out the parameters of a model that is on its device, in place."""
    dtype = torch.bfloat16 if precision == torch.bfloat16 else None
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module')   # logits are a view: not changed
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


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
    """-> in each process a whole copy of a sharded model. All of them must call it."""
    device = next(model.parameters()).device
    with torch.device('meta'):
        copy = GPT(model.config)
    copy = copy.to_empty(device=device)
    copy.load_state_dict(whole(model.state_dict()), strict=True)
    copy.rope.copy_(model.rope)
    return copy.train(model.training)


def whole(tree, here=True):
    """Dicts and lists with sharded tensors -> the same with whole ones, in the processes that say
    here (elsewhere None). All of them must call it."""
    if isinstance(tree, dict):
        return {key: whole(value, here) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(value, here) for value in tree]
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()
        return tree if here else None
    return tree


class PlainUnpickler(pickle.Unpickler):
    """Reads a checkpoint's index, which torch pickles: shapes and places, nothing else is made."""
    KNOWN = {
        'torch.distributed.checkpoint.metadata': (
            'BytesStorageMetadata', 'ChunkStorageMetadata', 'Metadata', 'MetadataIndex',
            'StorageMeta', 'TensorProperties', 'TensorStorageMetadata', '_MEM_FORMAT_ENCODING'),
        'torch.distributed.checkpoint.filesystem': ('_StorageInfo',), 'torch': ('Size',),
        'torch.serialization': ('_get_layout',), 'pathlib': ('PosixPath', 'WindowsPath')}

    def find_class(self, module, name):
        is_dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f'refused: it wants to load {module}.{name}')
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):

    def read_metadata(self, *how, **more):
        with open(Path(self.path, '.metadata'), 'rb') as file:
            metadata = PlainUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(dcp.DefaultLoadPlanner):

    def load_bytes(self, read_item, value):     # torch would unpickle whatever it is
        raise RuntimeError(f'refused: {read_item.dest_index.fqn} is no tensor')


def save_parts(model, optimizers, folder):
    """Write a checkpoint to a folder, each process its own parts; any number may read them. Only
    tensors are written: rates and the like are settings."""
    weights, state = get_state_dict(model, optimizers)
    dcp.save({'model': weights, 'optimizer': state['state']}, checkpoint_id=folder,
             no_dist=not dist.is_initialized())


def load_parts(model, optimizers, folder):
    """Read such a checkpoint into a model, sharded or not, and its optimizers (): the model alone.
    ValueError says what is wrong with it."""
    weights, state = get_state_dict(model, optimizers)
    content = {'model': weights} | ({'optimizer': state['state']} if optimizers else {})
    try:
        dcp.load(content, storage_reader=Reader(folder), planner=Planner(),
                 no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, OSError, LookupError, RuntimeError, ValueError,
            pickle.UnpicklingError) as error:
        why = str(error).strip().splitlines()[-1][:100]
        raise ValueError(f'{folder}: a part is missing or damaged ({why})') from None
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state)


def scatter(state, optimizer):
    """An optimizer's state dict with whole tensors -> the same with this process' parts"""
    params = [p for group in optimizer.param_groups for p in group['params']]

    def part(value, p):
        if not torch.is_tensor(value) or value.shape != p.shape:    # AdamW's count of steps
            return value
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)

    return {**state, 'state': {i: {name: part(value, params[i]) for name, value in values.items()}
                               for i, values in state['state'].items()}}
