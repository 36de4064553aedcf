"""Int8 models in folders: saved, loaded with the same bits, and refused where a file does not fit."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import bert
from fastbert.bert import BertConfig, BertForMaskedLM, BertModel
from fastbert.finetune import FinetuneConfig

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    # wide enough for columns of outliers
    "intermediate_size": 140,
    "max_position_embeddings": 24,
}
CASES = [
    ("bert", "Model"),
    ("bert", "ForPreTraining"),
    ("bert", "ForSequenceClassification"),
    ("roberta", "ForMaskedLM"),
    ("roberta", "ForTokenClassification"),
    ("distilbert", "ForMaskedLM"),
    ("distilbert", "ForQuestionAnswering"),
]
UP = "encoder.layer.1.intermediate.dense"
QUERY = "encoder.layer.0.attention.self.query"


def made(name="Model", bits=12, embeddings=False, **settings):
    torch.manual_seed(5)
    model = getattr(bert, f"Bert{name}")(BertConfig(**SIZES | settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        model.bert.layers[0].feed_forward.down.weight[:, 3] = 1.2
    return fastbert.quantize(model, bits, replace=True, embeddings=embeddings)


@torch.no_grad()
def results(model):
    torch.manual_seed(1)
    mask = (torch.arange(15) < torch.tensor([15, 4])[:, None]).long()
    output = model(input_ids=torch.randint(5, 61, (2, 15)), attention_mask=mask)
    return [v for v in output.to_tuple() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize(
    ("bits", "embeddings"), [(12, False), (8, True)], ids=["12", "8-embeddings"]
)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_round_trip(family, name, bits, embeddings, tmp_path):
    model = made(name, bits, embeddings, model_type=family)
    expected = results(model)
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    assert (again.config.int8_bits, again.config.int8_embeddings) == (bits, embeddings)
    for a, b in zip(results(again), expected, strict=True):
        assert torch.equal(a, b)
    again.save_pretrained(tmp_path / "b")
    files = [tmp_path / f / "model.safetensors" for f in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    stored = load_file(tmp_path / "a" / "model.safetensors")
    layers = {k: v for k, v in stored.items() if ".layer." in k}
    assert all(v.dtype == torch.int8 for k, v in layers.items() if k.endswith("int8_weight"))
    assert not [k for k, v in layers.items() if v.dtype == torch.float32 and v.dim() == 2]
    assert max(v.numel() for k, v in layers.items() if k.endswith("int8_sources")) > 0
    assert embeddings == any("word_embeddings.int8_weight" in k for k in stored)


def test_loading_imports_nothing_large(tmp_path):
    """torch's Python operators take seconds and 150 MB; normal_ on the meta device imports them."""
    made("ForMaskedLM", embeddings=True).save_pretrained(tmp_path)
    code = (
        "import sys; from fastbert.bert import BertForMaskedLM; before = set(sys.modules); "
        "BertForMaskedLM.from_pretrained(sys.argv[1]); print(len(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 60


def test_other_classes_and_settings(tmp_path):
    made("ForPreTraining", embeddings=True).save_pretrained(tmp_path)
    encoder = BertModel.from_pretrained(tmp_path, int8_bits=8)
    assert encoder.frozen.bits == encoder.layers[0].attention.out.bits == 8
    masked = BertForMaskedLM.from_pretrained(tmp_path)
    assert masked.newly_initialised == ()
    # a pooler that the file lacks is drawn anew, as for other checkpoints
    masked.save_pretrained(tmp_path / "masked")
    assert BertModel.from_pretrained(tmp_path / "masked").newly_initialised


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")


def at(key, value, *index):
    def change(state):
        state[key][index] = value

    return change


def cast(key, dtype):
    return lambda state: state.update({key: state[key].to(dtype)})


DAMAGE = {
    "missing": (lambda s: s.pop(f"{UP}.int8_weight"), rf"lacks 1 weights .*{UP}\.int8_weight"),
    "no scale": (lambda s: s.pop(f"{QUERY}.int8_scale"), rf"lacks 1 .*{QUERY}\.int8_scale"),
    "-128": (at(f"{UP}.int8_weight", -128, 2, 3), rf"{UP}.* has the integer -128, and the least"),
    "dtype": (cast(f"{UP}.int8_weight", torch.float32), "is torch.float32 and not torch.int8"),
    "scale": (cast(f"{QUERY}.int8_scale", torch.bfloat16), "is torch.bfloat16 and not"),
    "nan": (at(f"{UP}.int8_scale", float("nan"), 1), "number that is negative or not finite"),
    "negative": (at(f"{UP}.int8_scale", -1.0, 1), "number that is negative or not finite"),
    "source": (
        at("encoder.layer.0.output.dense.int8_sources", 140, 0),
        r"names a column outside \[0, 140\)",
    ),
    "shape": (
        lambda s: s.update({f"{UP}.int8_weight": s[f"{UP}.int8_weight"][:, :-1]}),
        r"has shape \(140, 23\) and not \(140, 24\)",
    ),
    "sources": (
        lambda s: s.update({f"{QUERY}.int8_sources": torch.zeros(1, dtype=torch.int32)}),
        "differ: copy the folder again",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(name, tmp_path):
    made().save_pretrained(tmp_path)
    change, sentence = DAMAGE[name]
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        BertModel.from_pretrained(tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    made().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged, not a whole safetensors file"):
        BertModel.from_pretrained(tmp_path)


def changed(folder, **settings):
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 4}, "int8_bits is 4: it must be 12 or 8"),
        ({"bits": None}, "int8_bits is 0: it must be 12 or 8"),
        ({"bits": "12"}, "int8_bits is '12': it must be a whole number"),
        ({"embeddings": 1}, "int8_embeddings is 1: it must be true or false"),
        ({"embeddings": True}, r"lacks 2 weights .*word_embeddings\.int8_weight"),
        ({"layout": 2}, "has the layout 2 and this version of fastbert reads 1"),
        ({"layout": None}, "has the layout None"),
        ({"library": "gptq"}, "quantization_config is set: convert the weights back"),
    ],
)
def test_other_settings_are_refused(settings, sentence, tmp_path):
    made().save_pretrained(tmp_path)
    changed(tmp_path, **settings)
    with pytest.raises(ValueError, match=sentence):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("int8", "passed", "sentence"),
    [
        (True, {"int8_bits": None}, "are int8 and int8_bits=None was passed: leave it out"),
        (
            True,
            {"int8_embeddings": True},
            "has int8_bits=12 and int8_embeddings=False: leave these arguments out$",
        ),
        (False, {"int8_bits": 12}, "leave these arguments out, and call fastbert.quantize with"),
        (
            False,
            {"int8_bits": 8, "int8_embeddings": True},
            "int8_bits=8 and int8_embeddings=True were asked for",
        ),
    ],
)
def test_settings_do_not_change_the_kind_of_weights(int8, passed, sentence, tmp_path):
    model = made() if int8 else BertModel(BertConfig(**SIZES))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        BertModel.from_pretrained(tmp_path, **passed)


def test_files_and_settings_of_two_models_are_refused(tmp_path):
    """config.json of the int8 model with weights of the other, and the other way round."""
    made().save_pretrained(tmp_path / "int8")
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "float")
    ints, floats = tmp_path / "int8" / "config.json", tmp_path / "float" / "config.json"
    contents = ints.read_text(), floats.read_text()
    ints.write_text(contents[1])
    floats.write_text(contents[0])
    for folder, missing in (("int8", r"query\.weight"), ("float", r"query\.int8_weight")):
        with pytest.raises(ValueError, match=rf"{missing}.* use the config.json that belongs"):
            BertModel.from_pretrained(tmp_path / folder)


def test_nothing_is_loaded_from_a_file_that_does_not_fit(tmp_path):
    model = made()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = made()
    with torch.no_grad():
        other.embeddings.norm.bias.add_(1.0)
    other.save_pretrained(tmp_path)
    rewrite(tmp_path, DAMAGE["-128"][0])
    from fastbert.models.checkpoint import fill
    from fastbert.models.names import names_of
    from fastbert.models.weight_files import read_weights

    state = {f"bert.{k}": v for k, v in read_weights(tmp_path).items()}
    with pytest.raises(ValueError, match="-128"):
        fill(model, state, names_of("bert", "BertModel"), "x")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_training_from_an_int8_folder_is_refused(tmp_path):
    made().save_pretrained(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    config = FinetuneConfig(
        task="classify", model=str(tmp_path), sources=[str(tmp_path / "a.csv")], max_length=8
    )
    with pytest.raises(ValueError, match="has int8 weights, which can't be trained"):
        config.check_readable()


def test_transformers_refuses_the_folder(tmp_path):
    """It would draw new weights in the place of those that it misses."""
    transformers = pytest.importorskip("transformers")
    made().save_pretrained(tmp_path)
    for kind in (transformers.BertModel, transformers.AutoModel):
        with pytest.raises(ValueError, match="quantization config"):
            kind.from_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == SIZES["hidden_size"]
