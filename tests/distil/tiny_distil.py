"""Settings of distillations of a second or two, and a batch."""

import tiny_tasks
import torch

from fastbert.distil import DistilConfig, distil

TASKS = ["classify", "tag", "answer"]
# every loss of a kind of data, with weights
ALL = {
    "text": "soft:5,labels:2,cosine,hidden,attention:0.1,relations",
    "labelled": "soft,labels,cosine,hidden,attention:0.1,relations",
    "sentences": "vectors,cosine,hidden,attention:0.1,relations",
}


def settings(teacher, student="2x32", **more):
    """Keyword arguments of DistilConfig for a run of about a second."""
    given = {"teacher": str(teacher), "student": student, "epochs": 4, "lr": 3e-3, "dropout": 0.0}
    given |= {"attention_dropout": 0.0, "threads": 1, "backend": "torch", "log_every": 1}
    return given | {"batch_size": 16, "device": "cpu"} | more


def distilled(teachers, corpus, kind, out, task="classify", **more):
    """A run on a kind of data."""
    folder, lines = corpus
    if kind == "labelled":
        rows = tiny_tasks.ROWS[task]
        parts = {"train": rows(96), "validation": rows(32, seed=1), "test": rows(32, seed=2)}
        return distil(DistilConfig(**settings(teachers(task), **more)), out, quiet=True, **parts)
    source = folder if kind == "text" else lines
    given = settings(teachers(kind), sources=[str(source)], max_length=32, **more)
    return distil(DistilConfig(**given), out, quiet=True)


def batch_of_three():
    """Packed sequences of 5, 1 and 9 tokens."""
    lengths = torch.tensor([5, 1, 9])
    return {
        "input_ids": torch.randint(5, 20, (15,)),
        "token_type_ids": torch.zeros(15, dtype=torch.int64),
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        "max_seqlen": 9,
    }
