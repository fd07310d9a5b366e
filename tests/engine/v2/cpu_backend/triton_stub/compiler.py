"""What Triton asks of a backend's compiler; none of it is called in interpreted runs."""

from triton.backends.compiler import BaseBackend


class StubBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "stub"

    def parse_options(self, options):
        return options

    def add_stages(self, stages, options, language):
        pass

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
