"""fastbert.tune(): every backend that can run an op is timed, the winner is stored, used and explained."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import fastbert
from fastbert import bert, functional
from fastbert.backend import chooser, tuned
from fastbert.models.config import BertConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty(monkeypatch, tmp_path):
    """An empty cache, and no tuned result before or after."""
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(chooser, "tuned_tables", {})


def step():
    x = torch.randn(8, 16, requires_grad=True)
    functional.linear(functional.layer_norm(x), torch.randn(4, 16)).sum().backward()


def winner(slug, name, monkeypatch, *args):
    """Make `name` the fastest backend for calls of the same class as one with these arguments."""
    table = {tuned.key(slug, args): name}
    monkeypatch.setattr(chooser, "tuned_tables", {CPU: table})


def test_measures_every_backend_and_stores_the_fastest():
    if reason := chooser.matrix()["linear"]["cpu"]:
        pytest.skip(reason)
    found = fastbert.tune(step, rounds=2)
    assert found.keys() == {"layer_norm", "linear"}
    ((name, times),) = found["layer_norm"].items()
    assert name == "16 float32, up to 256 rows"
    assert times.keys() == {"cpu", "torch"}
    assert all(us > 0 for us in times.values())
    stored = json.loads(tuned.path().read_text())[tuned.device_name(CPU)]
    assert {e["op"]: e["backend"] for e in stored["entries"]}["layer_norm"] == min(
        times, key=times.get
    )
    assert stored["machine"]["versions"]["torch"] == torch.__version__


def test_both_directions_are_timed(monkeypatch):
    """The time of a class is that of forward and backward: without a backward it is less."""
    seen = []
    monkeypatch.setattr(tuned, "store", lambda device, results, facts: seen.append(results) or {})
    fastbert.tune(step, rounds=3)
    with torch.no_grad():
        fastbert.tune(lambda: functional.layer_norm(torch.randn(8, 16)), rounds=3)
    (both, forward) = (r[tuned.key("layer_norm", (torch.empty(8, 16),))]["torch"] for r in seen)
    assert forward < both


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_the_winner_runs(name, monkeypatch, capsys):
    if reason := chooser.matrix()["layer_norm"][name]:
        pytest.skip(reason)
    x = torch.randn(5, 24)
    winner("layer_norm", name, monkeypatch, x)
    assert chooser.choose("layer_norm", CPU, x, None, None, 1e-5) == name
    # calls of another width, or with more rows, are of other classes
    default = next(n for n in chooser.ORDER["cpu"] if chooser.matrix()["layer_norm"][n] is None)
    assert chooser.choose("layer_norm", CPU, x[:, :8].contiguous(), None, None, 1e-5) == default
    assert chooser.choose("layer_norm", CPU, x.repeat(99, 1), None, None, 1e-5) == default
    fastbert.explain("layer_norm", x)
    chosen = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("->"))
    assert name in chosen
    assert "fastest" in chosen


def test_a_winner_that_cannot_run_a_call_is_passed_over(monkeypatch):
    x = torch.randn(5, 24, dtype=torch.float64)
    winner("layer_norm", "cpu", monkeypatch, x)
    assert chooser.choose("layer_norm", CPU, x, None, None, 1e-5) == "torch"


def test_winners_hold_under_compile(monkeypatch):
    x = torch.randn(5, 24)
    winner("layer_norm", "torch", monkeypatch, x)
    torch._dynamo.reset()
    compiled = torch.compile(functional.layer_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), functional.layer_norm(x))


def test_a_whole_model_and_the_next_process():
    """Every op of a model has a class, forward and backward; a new process uses the stored winners."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model, ids = bert.BertForPreTraining(config), torch.randint(50, (2, 8))
    labels, pairs = ids.clone(), torch.tensor([0, 1])
    found = fastbert.tune(
        lambda: model(ids, labels=labels, next_sentence_label=pairs).loss.backward(), rounds=1
    )
    assert set(found) >= {"embed", "qkv_proj", "attention", "linear", "dropout_add_layer_norm"}
    assert set(found) >= {"feed_forward", "mlm_loss", "layer_norm", "cross_entropy"}
    text = "import torch; from fastbert.backend import chooser; print(len(chooser.tuned_tables[torch.device('cpu')]))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(chooser.tuned_tables[CPU])


def test_refusals():
    with pytest.raises(ValueError, match="rounds is 0"):
        fastbert.tune(step, rounds=0)
    with pytest.raises(ValueError, match="none of fastbert's ops"):
        fastbert.tune(lambda: torch.ones(3).sum())
    with fastbert.use("torch"), pytest.raises(ValueError, match="forced by name"):
        fastbert.tune(step)
    assert not tuned.path().exists()


def test_an_unreadable_file_is_named_and_ignored(caplog):
    tuned.path().write_text("{")
    assert tuned._read() == {}
    assert "run fastbert.tune() again" in caplog.text


ENTRY = {"op": "layer_norm", "dtype": "float32", "few_rows": True, "sizes": [16]}
LAUNCH = {"function": "rows", "arguments": [16, 80], "fields": {"ROWS": 2}}


@pytest.mark.parametrize(
    "content",
    [
        "x",
        [1],
        {"device": []},
        {"device": {"entries": 3, "configurations": "x"}},
        {"device": {"entries": [{}, 3, None, ENTRY], "configurations": [{}, 3, None]}},
        {"device": {"entries": [{**ENTRY, "backend": "cpu", "dtype": "torch"}]}},
        {"device": {"entries": [{**ENTRY, "backend": "cpu", "sizes": 3}]}},
        {"device": {"entries": [{**ENTRY, "backend": 3}]}},
        {"device": {"configurations": [{**LAUNCH, "arguments": ["torch.flo", [1]]}]}},
        {"device": {"configurations": [{**LAUNCH, "arguments": [[1], {}]}]}},
        {"device": {"configurations": [{**LAUNCH, "fields": 3}]}},
    ],
)
def test_what_another_version_stored_is_left_out(content, caplog):
    """Unreadable entries raise nothing, and tune() stores its own."""
    if isinstance(content, dict):
        content = {tuned.device_name(CPU): content["device"]}
    tuned.path().write_text(json.dumps(content))
    assert tuned.stored() == {}
    assert tuned.configurations() == {}
    fastbert.tune(step, rounds=1)
    assert tuned.stored()[CPU]


def test_an_error_in_the_step_leaves_the_choice_as_it_was():
    with pytest.raises(ZeroDivisionError):
        fastbert.tune(lambda: 1 / 0)
    assert chooser.tuned_tables == {}


def test_command(tmp_path):
    from fastbert.cli.app import app

    arguments = [
        "tune",
        "--batch-size",
        "1",
        "--length",
        "8",
        "--layers",
        "1",
        "--rounds",
        "1",
        "--json",
    ]
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50}
        )
    )
    done = CliRunner().invoke(app, [*arguments, "--model", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "attention" in json.loads(done.output)
    assert tuned.path().exists()
    refused = CliRunner().invoke(app, ["tune", "--dtype", "int8"])
    assert "choose one of fp32, bf16, fp16" in str(refused.exception)


def test_a_run_s_manifest_names_the_winners(monkeypatch):
    """So that a resumed run can be refused where its backends have changed."""
    from fastbert.train.session import backends

    before = backends("cpu")
    winner("layer_norm", "torch", monkeypatch, torch.randn(5, 24))
    assert backends("cpu") == {**before, "layer_norm 24 torch.float32 few rows": "torch"}
    assert backends("cuda")["linear"] == "triton"
