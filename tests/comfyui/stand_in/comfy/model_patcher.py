"""What the manager holds of a model."""


class ModelPatcher:
    def __init__(self, model, load_device, offload_device):
        self.model = model
        self.load_device, self.offload_device = load_device, offload_device
        self.model_size()  # asked for at once, before a subclass has finished

    def model_patches_to(self, device):
        pass

    def __del__(self):
        self.detach(unpatch_all=False)
