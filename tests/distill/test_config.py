import pytest
import torch

from graftkit.distill import config as module
from graftkit.distill.config import DistillConfig, Settings
from graftkit.errors import ConfigError

LEAST = """
target = "target"
[prompts]
file = "prompts.jsonl"
[[sources]]
kind = "model"
name = "big"
model = "big"
[[scores]]
kind = "agreement"
"""


def read(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return DistillConfig.read_toml(file)


def test_the_least_configuration_is_the_papers_pipeline(tmp_path):
    config = read(tmp_path, LEAST)
    assert config.dpo is not None
    assert (config.dpo.loss, config.dpo.beta) == ("sigmoid_norm", 10.0)
    assert config.sft.lora is None
    assert config.selection.gap == (0.01, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "[sft]\nlearning_rte = 1e-5",
            "unknown key sft.learning_rte; did you mean sft.learning_rate?",
        ),
        ("[sft]\nlora = { rnk = 4 }", "unknown key sft.lora.rnk; did you mean sft.lora.rank?"),
        ("[slection]\ngap = [0, 1]", "unknown key slection; did you mean selection?"),
        ("[sft]\nepochs = 0", r"sft.epochs: Input should be greater than 0 \(found 0\)"),
        ("[selection]\ngap = [1, 0]", r"gap \[1.0, 0.0\] is empty"),
        ("[selection]\npairs = 'checked'", "needs a rule among the scores"),
        ("[selection]\npairs = 'mixed'", "target_source belongs to pairs = mixed"),
        ("[dpo]\nloss = 'wrpo'", "belong together"),
        ("[dpo]\nbatch_size = 10\nmicro_batch_size = 3", "3 does not divide 10"),
        ("[pack]\nbudget = '5 apples'", "pack.budget: budget '5 apples' is not understood"),
        ("[[sources]]\nkind = 'model'\nname = 'big'\nmodel = 'x'", "two sources are called big"),
        ("[[sources]]\nkind = 'oracle'\nname = 'x'", "oracle"),
        ("[[sources]]\nkind = 'model'\nname = '../x'\nmodel = 'x'", "sources.1.model.name"),
        ("[sft", "not TOML"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, LEAST + change)
    assert "\n" not in str(error.value)


def test_an_unknown_key_of_a_source_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean sources\.model\.samples\?"):
        read(tmp_path, LEAST.replace('name = "big"', 'name = "big"\nsampels = 3'))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        DistillConfig.read_toml(tmp_path / "none.toml")


def test_false_leaves_preference_optimisation_out(tmp_path):
    assert read(tmp_path, "dpo = false\n" + LEAST).dpo is None


def test_every_setting_has_a_sentence():
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Settings)
    ]
    missing = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, field in kind.model_fields.items()
        if name != "kind" and not field.description
    ]
    assert len(kinds) > 15
    assert not missing


def test_bfloat16_is_the_default_only_where_the_device_multiplies_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "run.toml").write_text(LEAST, encoding="utf-8")
    for instructions, expected in (
        ({"avx2": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda actual=instructions: actual)
        config = DistillConfig.read_toml(tmp_path / "run.toml")
        assert (config.sft.precision, config.dpo.precision) == (expected, expected)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    assert DistillConfig.read_toml(tmp_path / "run.toml").sft.precision == "bfloat16"
