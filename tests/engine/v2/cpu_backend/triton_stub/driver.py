"""What Triton asks of a backend's driver: where kernels run."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class StubDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cpu", "interpreter", 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return lambda call, *, quantiles, **kwargs: [0.0] * len(quantiles)

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0
