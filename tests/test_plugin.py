"""How the plugin changes vLLM's configuration for SlimSpec drafters, and that it changes nothing else. No engine starts
here."""

import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import drafters
import pytest
import torch

from vllm_slimspec import compat
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import head_spec


def _python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_importing_the_package_imports_nothing_heavy():
    """Catches: torch, vLLM or Triton imported by the package's own import, for which every vLLM process would pay."""
    heavy = "{'torch', 'vllm', 'triton', 'transformers', 'numpy', 'typer'}"
    assert _python(f"import sys, vllm_slimspec; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_command_line_starts_without_what_comes_with_vllm():
    """Catches: `slimspec --version` that fails in an environment without vLLM, or that takes seconds to start."""
    brought = "{'torch', 'vllm', 'tqdm', 'transformers', 'numpy', 'httpx', 'matplotlib'}"
    assert _python(f"import sys, vllm_slimspec.cli; print(sorted({brought} & set(sys.modules)))") == "[]"


PROBE = """
from vllm.plugins import load_general_plugins
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
load_general_plugins()
archs = ModelRegistry.get_supported_archs()
print("SlimSpecLlamaForCausalLMEagle3" in archs, hasattr(EngineArgs.create_speculative_config, "slimspec"))
"""


@pytest.mark.parametrize(
    ("plugins", "seen"), [(None, "True True"), ("slimspec", "True True"), ("other", "False False")]
)
def test_plugin_registers_unless_vllm_plugins_excludes_it(plugins, seen):
    """Catches: an entry point that vLLM does not find, or a plugin that acts although VLLM_PLUGINS excludes it."""
    env = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    assert _python(PROBE, **env) == seen


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("models") / "target"
    config = LlamaConfig(
        hidden_size=drafters.D,
        intermediate_size=drafters.FF,
        num_hidden_layers=4,
        num_attention_heads=drafters.HEADS,
        num_key_value_heads=drafters.KV_HEADS,
        head_dim=drafters.HEAD_DIM,
        vocab_size=drafters.V,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def speculative(target):
    """speculative_config as the user writes it -> the SpeculativeConfig that vLLM makes of it."""
    from vllm.engine.arg_utils import EngineArgs

    def create(**given):
        args = EngineArgs(
            model=str(target),
            skip_tokenizer_init=True,
            max_model_len=128,
            enforce_eager=True,
            dtype="float32",
            speculative_config={"num_speculative_tokens": 3} | {k: v for k, v in given.items() if v is not None},
        )
        return args.create_engine_config().speculative_config

    return create


@pytest.fixture
def slim(tmp_path):
    return str(drafters.write(tmp_path / "drafter", drafters.config(), drafters.tensors()))


def test_drafter_without_a_method_is_served_as_eagle3(speculative, slim):
    """Catches: a SlimSpec drafter taken for a full draft model because its path does not contain "eagle3"."""
    config = speculative(model=slim)
    assert config.method == "eagle3"
    assert config.use_local_argmax_reduction
    assert config.draft_model_config.architecture == "SlimSpecLlamaForCausalLMEagle3"


def test_spec_model_flag_without_a_method_is_served_as_eagle3(target, slim):
    """Catches: a plugin that chooses the method for the JSON option only, and not for the flags --spec-model and
    --spec-tokens."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(target), skip_tokenizer_init=True, max_model_len=128, spec_model=slim, spec_tokens=3)
    config = args.create_engine_config().speculative_config
    assert (config.method, config.use_local_argmax_reduction) == ("eagle3", True)


def test_torchspec_folder_is_served_by_our_class(speculative, tmp_path):
    """Catches: a TorchSpec drafter served by vLLM's dense class, because it names a stock architecture."""
    written = drafters.config(
        architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None, lm_head_rank_divisor=8, draft_vocab_size=None
    )
    config = speculative(model=str(drafters.write(tmp_path / "d", written, drafters.tensors())))
    assert config.draft_model_config.architecture == "SlimSpecLlamaForCausalLMEagle3"
    assert config.use_local_argmax_reduction


@pytest.mark.parametrize("place", ["layer", "top"])
@pytest.mark.parametrize("method", [None, "eagle3"])
def test_speculators_folder_is_served_by_our_class(speculative, tmp_path, method, place):
    """Catches: vLLM's reader of speculators configs putting its own architecture in the place of ours, or dropping our
    keys."""
    layer = drafters.config(architectures=None, draft_vocab_size=None)
    written = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": drafters.V,
        "norm_before_residual": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "x", "architectures": ["LlamaForCausalLM"]},
        },
    }
    if place == "top":
        written["lm_head_rank"] = layer.pop("lm_head_rank")
    folder = drafters.write(tmp_path / "d", written, drafters.tensors())
    config = speculative(model=str(folder), method=method)
    assert config.draft_model_config.architecture == "SlimSpecLlamaForCausalLMEagle3"
    assert config.draft_model_config.hf_config.lm_head_rank == drafters.R
    assert config.use_local_argmax_reduction


def test_fused_path_is_off_with_probabilistic_drafts(speculative, slim):
    """Catches: the fused path turned on where vLLM has to sample from the draft logits."""
    assert not speculative(model=slim, draft_sample_method="probabilistic").use_local_argmax_reduction


@pytest.mark.parametrize("key", ["use_local_argmax_reduction", "use-local-argmax-reduction"])
def test_fused_path_stays_off_where_the_user_turned_it_off(speculative, slim, key):
    """Catches: a plugin that overrules the user's use_local_argmax_reduction=false."""
    assert not speculative(model=slim, **{key: False}).use_local_argmax_reduction


def test_configuration_of_a_dense_drafter_is_unchanged(speculative, tmp_path):
    """Catches: a plugin that changes any field of the configuration of a dense drafter."""
    from vllm.engine.arg_utils import EngineArgs

    written = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
    folder = str(drafters.write(tmp_path / "d", written, drafters.dense(drafters.tensors())))

    def fields(config):
        names = [f.name for f in dataclasses.fields(config)]
        return {n: repr(getattr(config, n)) for n in names if not n.endswith("_config") and not n.startswith("_")} | {
            "architectures": config.draft_model_config.architectures
        }

    ours = fields(speculative(model=folder, method="eagle3"))
    wrapped = EngineArgs.create_speculative_config
    EngineArgs.create_speculative_config = wrapped.__wrapped__
    try:
        assert fields(speculative(model=folder, method="eagle3")) == ours
    finally:
        EngineArgs.create_speculative_config = wrapped


def test_another_method_for_our_drafter_is_refused(speculative, slim):
    """Catches: a SlimSpec drafter silently served as a full draft model because the user gave another method."""
    with pytest.raises(CheckpointError, match="served with method 'eagle3', not 'eagle'"):
        speculative(model=slim, method="eagle")


@pytest.mark.parametrize(
    ("given", "modelscope"),
    [
        ({"model": "ngram"}, ""),
        ({"method": "custom_class", "model": "a.B"}, ""),
        ({"model": "private.module.Proposer"}, ""),
        ({"method": "eagle3", "model": "someone/a-drafter"}, ""),
        ({"model": "someone/a-drafter"}, "1"),
    ],
)
def test_hub_is_not_asked_about_models_that_cannot_be_ours(monkeypatch, given, modelscope):
    """Catches: a request to the hub from a server that does not use this package, which may leak the name of a private
    module."""
    from vllm.transformers_utils import repo_utils

    monkeypatch.setattr(repo_utils, "get_hf_file_to_dict", lambda *args: pytest.fail(f"a hub was asked for {args}"))
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", modelscope or "0")
    args = SimpleNamespace(speculative_config=given)
    compat._choose_method(args, given)
    assert args.speculative_config is given


@pytest.mark.parametrize("stages", [1, 2])
def test_pipeline_parallelism_needs_a_drafter_with_its_own_embeddings(slim, tmp_path, stages):
    """Catches: drafts from embeddings that were never loaded, because only the first pipeline stage has the
    target's."""
    args = SimpleNamespace(load_format="auto", pipeline_parallel_size=stages)
    owned = drafters.tensors() | {"embed_tokens.weight": torch.zeros(drafters.V, drafters.D)}
    own = str(drafters.write(tmp_path / "own", drafters.config(), owned))
    for folder in (slim, own):
        config = SimpleNamespace(draft_model_config=SimpleNamespace(model=folder), target_model_config=None)
        if stages > 1 and folder == slim:
            with pytest.raises(CheckpointError, match=r"\(2 stages\) needs; serve with --tensor-parallel-size"):
                compat._check_on_disk(args, config, head_spec(drafters.config()))
        else:
            compat._check_on_disk(args, config, head_spec(drafters.config()))


def test_served_class_carries_the_release_of_the_package():
    """Catches: vLLM serving a new release by what it cached about the model class of an earlier one."""
    import vllm_slimspec
    from vllm_slimspec.drafters import served

    assert vllm_slimspec.__version__ == served.RELEASE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 512, "draft_vocab_size": 512}, "vocab_size=512 but the target"),
        ({"lm_head_rank": 4}, "shape"),
        ({"lm_head_rank": 0}, "lm_head_rank=0"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "3 different ids from 0 to 4"),
    ],
)
def test_bad_drafter_is_refused_while_the_configuration_is_made(speculative, tmp_path, change, words):
    """Catches: a bad drafter that is reported only by the engine process, after the target was loaded."""
    folder = drafters.write(tmp_path / "d", drafters.config(**change), drafters.tensors())
    with pytest.raises(CheckpointError, match=words):
        speculative(model=str(folder))


def test_installing_twice_wraps_once():
    """Catches: one more layer of wrapping for each process that loads plugins again."""
    from vllm.engine.arg_utils import EngineArgs

    compat.install()
    once = EngineArgs.create_speculative_config
    compat.install()
    assert EngineArgs.create_speculative_config is once
    assert not hasattr(once.__wrapped__, "slimspec")


@pytest.fixture
def warnings(monkeypatch):
    """The plugin's warnings; vLLM's loggers do not propagate to pytest's."""
    records = []
    monkeypatch.setattr(compat.logger, "warning", lambda message, *args: records.append(message % args))
    return records


def test_vllm_older_than_supported_gets_one_warning_and_no_models(monkeypatch, warnings):
    """Catches: a crash, or silence, on a vLLM that is older than the interfaces used here."""
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.25.1")
    monkeypatch.setattr(vllm.ModelRegistry, "register_model", lambda *a: pytest.fail("registered"))
    compat.install()
    assert len(warnings) == 1
    assert "0.26.0 or newer and found 0.25.1" in warnings[0]


@pytest.mark.parametrize(("version", "count"), [("0.32.0+cpu", 0), ("0.34.1", 1), ("0.1.dev99+g1234", 0), ("dev", 0)])
def test_only_a_vllm_newer_than_tested_gets_a_warning(warnings, version, count):
    """Catches: no warning on a release that was never tested, or a warning on a tested one."""
    assert compat._supported(version)
    assert len(warnings) == count


def test_missing_method_to_wrap_only_warns(monkeypatch, warnings):
    """Catches: a server that dies because vLLM renamed the method that the plugin wraps."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.delattr(EngineArgs, "create_speculative_config")
    compat._wrap_create_speculative_config()
    assert "use_local_argmax_reduction" in warnings[0]


@pytest.mark.parametrize(("version", "count"), [("0.25.1", 1), ("99.0", 1)])
def test_stock_drafter_works_with_one_warning_on_an_unsupported_vllm(
    monkeypatch, warnings, speculative, tmp_path, version, count
):
    """Catches: an unsupported vLLM on which installing this package does more than add one line to the log."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(EngineArgs, "create_speculative_config", EngineArgs.create_speculative_config.__wrapped__)
    compat.install()
    assert len(warnings) == count
    written = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
    folder = drafters.write(tmp_path / "d", written, drafters.dense(drafters.tensors()))
    assert speculative(model=str(folder), method="eagle3").draft_model_config.architecture == "LlamaForCausalLMEagle3"
    assert len(warnings) == count


def test_model_registry_that_refuses_only_warns(monkeypatch, warnings):
    """Catches: a server that dies in the plugin hook because vLLM registers models in another way."""
    import vllm

    def moved(*args):
        raise TypeError("register_model() takes other arguments")

    monkeypatch.setattr(vllm.ModelRegistry, "register_model", moved)
    compat.install()
    assert len(warnings) == 1
    assert "SlimSpec drafters are not available" in warnings[0]


@pytest.mark.parametrize("moved", ["_choose_method", "_adopt"])
def test_error_in_our_code_leaves_a_stock_drafter_to_vllm(monkeypatch, warnings, speculative, tmp_path, moved):
    """Catches: a stock drafter refused because vLLM renamed a field that only SlimSpec drafters need."""

    def missing(*args):
        raise AttributeError("no such field")

    monkeypatch.setattr(compat, moved, missing)
    written = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
    folder = drafters.write(tmp_path / "d", written, drafters.dense(drafters.tensors()))
    assert speculative(model=str(folder), method="eagle3").method == "eagle3"
    assert len(warnings) == 1
    assert "does not change it" in warnings[0]


def test_child_process_does_not_repeat_the_warning(monkeypatch, warnings):
    """Catches: the same warning again from every engine and worker process."""
    monkeypatch.setattr(compat.multiprocessing, "parent_process", lambda: object())
    assert compat._supported("99.0")
    assert warnings == []


@pytest.mark.parametrize("touch", compat.TOUCHES, ids=lambda touch: touch.name)
def test_listed_vllm_internal_is_found_and_its_absence_is_noticed(touch):
    """Catches: an entry of TOUCHES that vLLM no longer has or whose file is elsewhere, or a look-up that finds
    anything."""
    assert touch.found()
    place = f"{touch.module.replace('.', '/')}.py"
    assert inspect.getfile(importlib.import_module(touch.module)).endswith(f"/{place}")
    gone = dataclasses.replace(touch, name=f"{touch.name}_gone")
    assert not gone.found()
    assert not dataclasses.replace(touch, module="vllm.no_such_module").found()


def test_info_line_of_ours_reaches_the_output(target):
    """Catches: our lines under a logger name that vLLM does not configure, so that nobody sees them."""
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm_slimspec import compat\n"
        f"EngineArgs(model={str(target)!r}, skip_tokenizer_init=True, max_model_len=128).create_engine_config()\n"
        "compat.logger.info('a line of ours')"
    )
    settings = {"CONFIGURE_LOGGING": "1", "LOGGING_LEVEL": "INFO", "LOGGING_STREAM": "ext://sys.stdout"}
    assert _python(code, **{f"VLLM_{name}": value for name, value in settings.items()}).endswith("a line of ours")


HUB = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(
    model=sys.argv[1], skip_tokenizer_init=True, max_model_len=128,
    speculative_config={"model": "someone/a-drafter", "num_speculative_tokens": 3},
).create_engine_config().speculative_config
print(config.method, config.use_local_argmax_reduction, config.draft_model_config.architecture,
      config.draft_load_config.load_format)
"""


def test_drafter_named_by_its_hub_id_is_recognized_and_loads_safetensors(target, tmp_path):
    """Catches: a drafter that is recognized only as a folder, or whose .bin weights are taken from the hub."""
    cached = tmp_path / "models--someone--a-drafter"
    drafters.write(cached / "snapshots" / ("0" * 40), drafters.config(), drafters.tensors())
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(target)], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-4:] == ["eagle3", "True", "SlimSpecLlamaForCausalLMEagle3", "safetensors"]
