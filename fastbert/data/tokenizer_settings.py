"""The settings of a tokenizer's folder: its class, its options and its added tokens, as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fastbert.data.tokenizer import BERT_TOKENS, ROBERTA_TOKENS, is_roberta
from fastbert.files import parse_json, quoted, read_text, shortened

Json = dict[str, Any]

# model_type of config.json -> class where no file names one
_CLASSES = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "gpt2": "GPT2Tokenizer",
}
FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TokenizerFolder:
    """The files of a tokenizer; `file` holds its vocabulary."""

    def __init__(self, file: Path) -> None:
        self.file, self.path = file, file.parent
        config = self.read_json("config.json")
        self.settings = self.read_json("tokenizer_config.json")
        # special tokens beside the seven roles; added_tokens.json's tokens of the second list are not special
        extra = self._list("extra_special_tokens") or self._list("additional_special_tokens")
        self.extra, self.more = (extra, []) if isinstance(extra, list) else ([], [*extra.values()])
        if "added_tokens_decoder" not in self.settings:
            # as in transformers, which prefers the settings of this file here
            found = self.read_json("special_tokens_map.json")
            self.settings = {**self.settings, "extra_special_tokens": None, **found}
            extra = self._list("extra_special_tokens")
            self.extra = [*self.extra, *(extra if isinstance(extra, list) else extra.values())]
            self.more = [*self.more, *self._list("additional_special_tokens")]
        name = self.settings.get("tokenizer_class") or config.get("tokenizer_class")
        # AutoTokenizer finds no class where both files are silent: it reads tokenizer.json alone
        self.named = bool(name or config)
        if not self.named:
            guesses = {"tokenizer.json": "PreTrainedTokenizer", "vocab.json": "RobertaTokenizer"}
            name = guesses.get(file.name, "BertTokenizer")
        family = str(config.get("model_type"))
        self.name = str(name or _CLASSES.get(family, f"tokenizer of {family}"))[:80]
        self.name = self.name.removesuffix("Fast")
        # the content of tokenizer.json
        self.saved: Json | None = None

    def read_json(self, name: str) -> Json:
        """The JSON object in a file of the folder; {} without one."""
        file = self.path / name
        if not file.is_file():
            return {}
        found = read(file, lambda name: parse_json(read_text(Path(name))))
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds no JSON object: write it anew")
        return found

    def _list(self, name: str) -> Any:
        found = self.settings.get(name) or []
        if not isinstance(found, (list, dict)):
            raise ValueError(f"{self.path}: {name} is {quoted(found)}: it must be a list of tokens")
        return found

    def flag(self, name: str, default: bool | None) -> bool | None:
        """A setting that is true or false; raises ValueError for another value."""
        value = self.settings.get(name, default)
        if not isinstance(value, bool) and value is not default:
            raise ValueError(f"{self.path}: {name} is {quoted(value)}: it must be true or false")
        return value

    def refused(self, why: str) -> ValueError:
        """The error for a folder for which AutoTokenizer might give other ids."""
        folder = repr(str(self.path))
        line = f"A.from_pretrained({folder}).save_pretrained({folder})"
        return ValueError(
            f"{self.path}: {why}, and its ids might differ from those of transformers' AutoTokenizer: let it write "
            f'tokenizer.json, python -c "from transformers import AutoTokenizer as A; {line}"'
        )

    def special_tokens(self, tokenizer: Tokenizer, model: str | None) -> list[Any]:
        """The tokens of the seven roles, from the files, or else the defaults of the tokenizer's class."""
        names = ROBERTA_TOKENS if is_roberta(tokenizer) else BERT_TOKENS
        found: list[Any] = []
        for role in ROLES:
            token = self.settings.get(f"{role}_token") or None
            if model is None or role not in names:
                found += [token] if token else []
                continue
            text = token.get("content") if isinstance(token, dict) else token
            if text not in (None, names[role]):
                raise self.refused(f"its {role}_token is {quoted(text)} and not {names[role]}")
            found.append(token or names[role])
        if model == "BPE" and isinstance(found[-1], str):
            known = tokenizer.get_added_tokens_decoder().values()
            if self.named and names["mask"] not in {str(token.content) for token in known}:
                raise self.refused(
                    "no file says if <mask> includes the space before it, as in transformers 4, or not, as in 5"
                )
            found[-1] = AddedToken(names["mask"], lstrip=True, special=True)
        return found

    def saved_tokens(self) -> dict[int, AddedToken]:
        """The added tokens of tokenizer.json by id."""
        tokens = self.saved["added_tokens"] if self.saved is not None else []
        return {token["id"]: self.token(token) for token in tokens}

    def listed_tokens(self, saved: dict[int, AddedToken]) -> dict[int, AddedToken]:
        """The added tokens by id: of tokenizer_config.json, or else of tokenizer.json and added_tokens.json."""
        decoder = self.settings.get("added_tokens_decoder")
        if "added_tokens_decoder" in self.settings:
            if not isinstance(decoder, dict):
                raise ValueError(
                    f"{self.path}: added_tokens_decoder is no JSON object: write it anew"
                )
            return {self._index(i): self.token(t) for i, t in decoder.items()}
        roles = [self.settings.get(f"{role}_token") for role in ROLES]
        special = {
            str(t.get("content") if isinstance(t, dict) else t) for t in (*roles, *self.extra)
        }
        added = {
            self._index(i): AddedToken(t, normalized=t not in special, special=t in special)
            for t, i in self.read_json("added_tokens.json").items()
        }
        return {**added, **saved}

    def token(self, given: Any, special: bool = False) -> AddedToken:
        """A token from its text or its JSON object; raises ValueError for anything else."""
        if isinstance(given, AddedToken):
            return given
        flags = {"content": given} if isinstance(given, str) else given
        if not isinstance(flags, dict) or not isinstance(flags.get("content"), str):
            raise ValueError(f"{self.path}: an added token is {quoted(given)}: write it anew")
        bools = {name: flags[name] for name in FLAGS[1:] if name in flags}
        if not all(isinstance(value, bool) for value in bools.values()):
            raise ValueError(f"{self.path}: an added token is {str(given)[:150]}: write it anew")
        try:
            return AddedToken(flags["content"], **(bools | ({"special": True} if special else {})))
        except UnicodeError as error:
            raise ValueError(f"{self.path}: an added token is no Unicode text: {error}") from error

    def _index(self, value: Any) -> int:
        if isinstance(value, bool) or not str(value).isdecimal():
            raise ValueError(f"{self.path}: an added token has the id {quoted(value)}: correct it")
        return int(value)


def flags_of(token: AddedToken) -> tuple[Any, ...]:
    """All that distinguishes two added tokens but their ids."""
    return tuple(getattr(token, name) for name in FLAGS)


def read(file: Path, reader: Any) -> Any:
    """Call `reader` on the file's name; the library raises bare Exception for files it can't read."""
    try:
        return reader(str(file))
    except Exception as error:
        raise ValueError(
            f"{file} can't be read ({shortened(str(error), 300)}): it is no tokenizer file or is damaged"
        ) from error
