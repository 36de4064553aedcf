"""The peers: each is a function that takes a Job and returns a function of the batch's number.

The returned function returns the last hidden state; in training it is a Step. A peer that can't do a job raises
Unsupported. Functions import third-party packages inside, since each environment has different ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[int], Any]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Unsupported(Exception):
    """This peer can't do this work here; the message is a sentence."""


@dataclass
class Job:
    """The work and its surroundings, as the driver sends them."""

    kind: str  # "infer", "pretrain" or "finetune"
    precision: str  # "fp32", "bf16" or "int8"
    folder: Path  # holds model/, classifier/ and the peers' converted models
    inputs: Path  # holds batch0.npz, ...
    threads: int

    def batches(self) -> list[dict[str, np.ndarray]]:
        """The inputs, int64 (B, S), with labels where training needs them."""
        files = sorted(self.inputs.glob("batch*.npz"))
        return [dict(np.load(file)) for file in files]

    def tensors(self) -> list[dict[str, Any]]:
        """The inputs as torch tensors."""
        import torch

        return [{k: torch.from_numpy(v) for k, v in batch.items()} for batch in self.batches()]

    def autocast(self) -> Any:
        """torch's mixed precision where the work is bf16."""
        import torch

        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


# --- models in torch ---


@dataclass
class Step:
    """One training step: forward with dropout, backward, fused AdamW with learning rate 0."""

    model: Any
    job: Job

    def __post_init__(self) -> None:
        import torch

        self.batches = self.job.tensors()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def __call__(self, number: int) -> None:
        self.model.train()
        with self.job.autocast():
            loss = self.model(**self.batches[number]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> float:
        """The loss of the first batch without dropout."""
        import torch

        self.model.eval()
        with torch.no_grad(), self.job.autocast():
            return float(self.model(**self.batches[0]).loss)


def infer(model: Any, job: Job, context: Callable) -> Call:
    """A function that returns a module's last hidden state, under inference_mode or no_grad."""
    batches = job.tensors()

    def call(number: int) -> Any:
        with context():
            return model(**batches[number]).last_hidden_state

    return call


def transformers_model(job: Job, attention: str = "sdpa", bf16_weights: bool = False) -> Any:
    """The transformers model for the job, in fp32, or with all weights in bf16."""
    import torch
    import transformers

    classes = {
        "infer": transformers.BertModel,
        "pretrain": transformers.BertForPreTraining,
        "finetune": transformers.BertForSequenceClassification,
    }
    source = job.folder / ("classifier" if job.kind == "finetune" else "model")
    dtype = torch.bfloat16 if bf16_weights else torch.float32
    return (
        classes[job.kind].from_pretrained(source, attn_implementation=attention, dtype=dtype).eval()
    )


def stock(job: Job, attention: str = "sdpa", compiled: bool = False, frozen: bool = False) -> Any:
    """transformers, eager or compiled: weights cast to bf16 in inference, autocast in training."""
    import torch

    training = job.kind != "infer"
    model = transformers_model(job, attention, job.precision == "bf16" and not training)
    if compiled:
        # with freezing inductor prepacks the weights
        torch._inductor.config.freezing = frozen
        model.compile()
    if training:
        return Step(model, job)
    return infer(model, job, torch.no_grad if compiled else torch.inference_mode)


def autocast(job: Job) -> Call:
    """transformers under autocast: the parts in fp32 cost time and keep accuracy."""
    import torch

    if job.precision != "bf16" or job.kind != "infer":
        raise Unsupported("autocast differs from sdpa in bf16 inference only")
    call = infer(transformers_model(job), job, torch.inference_mode)

    def cast(number: int) -> Any:
        with job.autocast():
            return call(number)

    return cast


def fastbert(job: Job, freeze: bool = True, quantize: bool = True) -> Any:
    """This project; `freeze` prepacks the weights for inference, as other engines do. In bf16 weights are cast.

    In int8 work `quantize` takes the place of `freeze`.
    """
    import torch

    import fastbert
    from fastbert import bert
    from fastbert.backend import cpu

    if cpu.native is None:
        raise Unsupported(str(cpu.unavailable))
    names = {"infer": "BertModel", "pretrain": "BertForPreTraining"}
    cls = getattr(bert, names.get(job.kind, "BertForSequenceClassification"))
    source = job.folder / ("classifier" if job.kind == "finetune" else "model")
    model = cls.from_pretrained(source)
    if job.kind != "infer":
        return Step(model, job)
    model = model.to(torch.bfloat16 if job.precision == "bf16" else torch.float32).eval()
    if job.precision == "int8" and quantize:
        # as the folders that `fastbert quantize` writes
        fastbert.quantize(model, replace=True)
    elif freeze:
        fastbert.freeze(model)
    return infer(model, job, torch.inference_mode)


def dynamic(job: Job) -> Call:
    """torch's dynamic quantisation of every Linear."""
    import torch

    model = transformers_model(job)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    return infer(quantized, job, torch.inference_mode)


def zentorch(job: Job) -> Call:
    """AMD's backend of torch.compile; it repacks the weights in place, so the model has no other use."""
    import torch
    import zentorch

    if not zentorch._C.is_avx512_supported():
        raise Unsupported("zentorch optimises nothing on a CPU without AVX-512: plain inductor")
    torch._inductor.config.freezing = True
    model = transformers_model(job, bf16_weights=job.precision == "bf16")
    model.compile(backend="zentorch")
    return infer(model, job, torch.no_grad)


# --- converted models ---


def once(target: Path, make: Callable[[Path], Any]) -> Path:
    """A converted model, made at its first use."""
    if not target.exists():
        unfinished = target.with_name(f"unfinished-{target.name}")
        make(unfinished)
        unfinished.rename(target)
    return target


def export_onnx(job: Job, target: Path) -> None:
    """BertModel in ONNX; onnxruntime fuses the graph of this attention and exporter only."""
    import torch

    class Hidden(torch.nn.Module):
        """BertModel with the arguments in the order in which the exporter passes them."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers_model(job, attention="eager")

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.bert(ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, "last_hidden_state")}
    torch.onnx.export(
        Hidden().eval(),
        tuple(job.tensors()[0][name] for name in INPUTS),
        str(target),
        input_names=list(INPUTS),
        output_names=["last_hidden_state"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )


def optimize_onnx(job: Job, source: Path, target: Path) -> None:
    """Fuse attention, layer norms and GELU; raises where attention is not fused, since that would be no fair peer."""
    from onnxruntime.transformers import optimizer

    config = json.loads((job.folder / "model" / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["hidden_size"]
    model = optimizer.optimize_model(
        str(source), model_type="bert", num_heads=heads, hidden_size=width
    )
    fused = model.get_fused_operator_statistics()
    if fused.get("Attention", 0) != config["num_hidden_layers"]:
        raise Unsupported(f"onnxruntime's optimiser fused no attention: {fused}")
    model.save_model_to_file(str(target))


def quantize_onnx(source: Path, target: Path, reduced: bool) -> None:
    """Quantise a graph's weights to int8, or to 7 bits if `reduced`: sums of 7-bit weights can't saturate on AVX2.

    onnxruntime quantises the activations at run time.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # shapes can't be inferred through the fused nodes
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(
        str(source),
        str(target),
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduced,
        extra_options=extra,
    )


def onnxruntime(job: Job, reduced: bool = False) -> Call:
    """The CPU provider on the fused graph; `reduced` as in quantize_onnx."""
    if job.precision == "bf16":
        raise Unsupported("onnxruntime has no bf16 kernels for the CPU")
    import onnxruntime

    plain = once(job.folder / "bert.onnx", partial(export_onnx, job))
    file = once(job.folder / "bert-fused.onnx", partial(optimize_onnx, job, plain))
    if job.precision == "int8":
        name = f"bert-int8{'-reduced' if reduced else ''}.onnx"
        file = once(job.folder / name, partial(quantize_onnx, file, reduced=reduced))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    batches = [{k: v for k, v in batch.items() if k in wanted} for batch in job.batches()]
    return lambda number: session.run(["last_hidden_state"], batches[number])[0]


def openvino(job: Job) -> Call:
    """The CPU plugin, set to low latency and compiled for exactly this shape."""
    import openvino

    core = openvino.Core()
    can = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if job.precision == "bf16" and "BF16" not in can:
        raise Unsupported(f"openvino has no bf16 on this CPU, only {', '.join(can)}")
    batches = [{k: batch[k] for k in INPUTS} for batch in job.batches()]
    example = {k: v for k, v in job.tensors()[0].items() if k in INPUTS}
    model = openvino.convert_model(transformers_model(job), example_input=example)
    model.reshape({name: batches[0][name].shape for name in INPUTS})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[job.precision],
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def call(number: int) -> np.ndarray:
        request.infer(batches[number])
        return request.get_output_tensor(0).data

    return call


def convert_ctranslate2(job: Job, target: Path) -> None:
    """BertModel in CTranslate2's format; the converter wants an encoder's own directory."""
    from ctranslate2.converters import TransformersConverter

    encoder = target.with_name("ctranslate2-source")
    model = transformers_model(job)
    # the converter reads a setting that transformers 5 no longer writes
    model.config.position_embedding_type = "absolute"
    model.save_pretrained(encoder)
    TransformersConverter(str(encoder)).convert(str(target))


def ctranslate2(job: Job) -> Call:
    """CTranslate2's encoder, which removes padding on CPUs too."""
    if job.precision == "bf16":
        raise Unsupported("ctranslate2 computes bf16 on GPUs only")
    import ctranslate2

    source = once(job.folder / "ctranslate2", partial(convert_ctranslate2, job))
    kind = "int8_float32" if job.precision == "int8" else "float32"
    encoder = ctranslate2.Encoder(
        str(source), "cpu", compute_type=kind, inter_threads=1, intra_threads=job.threads
    )
    arguments = []
    for batch in job.batches():
        ids, types = (batch[k].astype(np.int32) for k in ("input_ids", "token_type_ids"))
        lengths = batch["attention_mask"].sum(1).astype(np.int32)
        views = [ctranslate2.StorageView.from_array(a) for a in (ids, lengths)]
        arguments.append((*views, types.tolist()))
    return lambda number: encoder.forward_batch(*arguments[number]).last_hidden_state


PEERS: dict[str, Callable[[Job], Any]] = {
    "fastbert": fastbert,
    "fastbert-fp32": partial(fastbert, quantize=False),
    "fastbert-unfrozen": partial(fastbert, freeze=False),
    "eager": partial(stock, attention="eager"),
    "sdpa": stock,
    "autocast": autocast,
    "compiled": partial(stock, compiled=True),
    "compiled-frozen": partial(stock, compiled=True, frozen=True),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "zentorch": zentorch,
    "ctranslate2": ctranslate2,
    "dynamic-int8": dynamic,
    "onnxruntime-int8": onnxruntime,
    "onnxruntime-int8-reduced": partial(onnxruntime, reduced=True),
    "ctranslate2-int8": ctranslate2,
}
