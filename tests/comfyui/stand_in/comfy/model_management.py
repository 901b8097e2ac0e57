"""One device, a list of loaded models, and a flag that interrupts."""

import torch

RESERVED = 400 << 20  # bytes

current: list = []  # patchers
free = 8 << 30  # bytes that nobody uses
interrupted = False
asked: list = []  # bytes that were wanted free


class InterruptProcessingException(Exception):
    pass


def get_torch_device():
    return torch.device("cpu")


def get_free_memory(device):
    assert device == get_torch_device()
    return free


def extra_reserved_memory():
    return RESERVED


def loaded_models():
    return list(current)


def load_models_gpu(models):
    for one in models:
        asked.append(one.model_size() - one.loaded_size())
        one.model_patches_to(one.load_device)
        one.partially_load(one.load_device, 1e32, force_patch_weights=False)
        if not any(one is known for known in current):
            current.append(one)


def free_memory(memory_required, device):
    """Unloads models until so many bytes are free, as far as that goes."""
    for one in list(current):
        short = memory_required - free
        if (
            0 < short < one.loaded_size()
            and one.partially_unload(one.offload_device, short) >= short
        ):
            return
        one.detach(True)
        current.remove(one)


def unload_all_models():
    free_memory(1e30, get_torch_device())


def throw_exception_if_processing_interrupted():
    global interrupted
    if interrupted:
        interrupted = False
        raise InterruptProcessingException
