"""Damages a good checkpoint at random, for `hostile_checkpoints.py` to open.

Knows: the files of a checkpoint, and content at which parsers of them have failed. Knows nothing of
minisrv.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    "special_tokens_map.json",
)
DEEP = 100_000


@dataclass(frozen=True)
class Case:
    """A copy of a good checkpoint, which is to be damaged, and other files, which nobody who opens
    it may read.

    directory: the checkpoint, with its weights in one file.
    sharded: a directory with the same weights in several files with an index.
    secrets: a directory outside of the checkpoint, with valid tokenizers, templates and configs
        under the names that they have in a checkpoint, and a text.
    """

    directory: Path
    sharded: Path
    secrets: Path

    def secret(self, rng: random.Random, name: str) -> Path:
        """Return the path of one of the secret files, mostly the one with that name."""
        wanted = self.secrets / name
        others = sorted(path for path in self.secrets.iterdir() if path.is_file())
        return wanted if wanted.is_file() and rng.random() < 0.7 else rng.choice(others)

    def outside(self, rng: random.Random) -> Any:
        """Return a value by which a JSON file could name one of the secret files: its path, or a
        list or object that holds it."""
        secret = self.secret(rng, "")
        name = rng.choice((str(secret), f"../{self.secrets.name}/{secret.name}"))
        return rng.choice((name, name, [name], {"a": name}, {"file": name}))


# --- JSON ---------------------------------------------------------------------------------------


class Raw(str):
    """A text that `dump` writes as it is, for JSON that `json.dumps` would not write."""


def raw_values() -> list[str]:
    """Return texts to write in the place of a JSON value."""
    return [
        *("null", "true", "0", "-1", "1", "2", "3", "2.5", "1e999", "-1e308", "NaN", "Infinity"),
        *("1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 5000, str(2**31), str(2**63), str(10**12)),
        *('""', '"x"', '"\\ud800"', '"\\u0000"', '"' + "y" * 2_000_000 + '"', '"../../etc/passwd"'),
        *("[]", "[null]", "[[]]", "{}", '{"a": 1}', '{"": ""}', "[1, 2, 3]", '["x", 1, null]'),
        *("[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[" * DEEP + "]" * DEEP),
        *("[" + "0," * 500_000 + "0]", "1000000000", "100000", "4294967295", "4294967296", "1e30"),
    ]


VALUES = raw_values()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths, as tuples of keys, of the parts of a JSON document; of a long list or
    object only those of the first parts."""
    found = [path] if path else []
    parts: list[Any] = []
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value))
    for key, part in parts[:12]:
        found += places(part, (*path, key))
    return found


def dump(value: Any) -> str:
    """Return `value` as JSON, in which texts of the class `Raw` stand as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        inside = (f"{json.dumps(key)}: {dump(part)}" for key, part in value.items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


FIELDS = {
    "config.json": (
        *("num_hidden_layers", "vocab_size", "hidden_size", "head_dim", "num_attention_heads"),
        *("num_key_value_heads", "intermediate_size", "max_position_embeddings", "rms_norm_eps"),
        *("rope_scaling", "rope_parameters", "rope_theta", "layer_types", "auto_map", "model_type"),
        *("architectures", "_name_or_path", "eos_token_id", "dtype", "torch_dtype", "id2label"),
        *(
            "num_labels",
            "quantization_config",
            "text_config",
            "configuration_files",
            "pad_token_id",
        ),
        *("tokenizer_class", "tie_word_embeddings", "use_sliding_window", "hidden_act"),
        *("sliding_window", "attn_implementation", "_attn_implementation", "transformers_version"),
    ),
    "generation_config.json": (
        *("eos_token_id", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("max_new_tokens", "min_new_tokens", "stop_strings", "num_beams", "watermarking_config"),
        *(
            "cache_implementation",
            "cache_config",
            "compile_config",
            "custom_generate",
            "bad_words_ids",
        ),
    ),
    "tokenizer_config.json": (
        *("tokenizer_class", "eos_token", "bos_token", "additional_special_tokens"),
        *("extra_special_tokens", "added_tokens_decoder", "model_max_length", "tokenizer_file"),
        *("vocab_file", "vocab", "merges", "merges_file", "gguf_file", "auto_map", "init_inputs"),
        *("fast_tokenizer_files", "backend", "processor_class", "chat_template", "from_slow"),
        *("add_prefix_space", "split_special_tokens", "clean_up_tokenization_spaces", "spm_file"),
    ),
    "tokenizer.json": (
        "model",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "added_tokens",
    ),
    "special_tokens_map.json": ("eos_token", "bos_token", "additional_special_tokens"),
}
KINDS = (
    *(
        "llama",
        "bert",
        "gpt2",
        "t5",
        "mistral",
        "qwen2_moe",
        "mamba",
        "whisper",
        "gemma3",
        "deepseek_v3",
    ),
)
CLASSES = (
    *("LlamaTokenizer", "BertTokenizer", "T5Tokenizer", "MistralCommonBackend", "GPT2Tokenizer"),
    *(
        "BertJapaneseTokenizer",
        "XLMRobertaTokenizer",
        "WhisperTokenizer",
        "EvilTokenizer",
        "TokenizersBackend",
    ),
    *(
        "Wav2Vec2CTCTokenizer",
        "CLIPTokenizer",
        "PreTrainedTokenizer",
        "SiglipTokenizer",
        "MarianTokenizer",
    ),
)


def change_json(rng: random.Random, case: Case) -> str:
    """Change one or two fields of one JSON file."""
    name = rng.choice(JSON_FILES)
    path = case.directory / name
    value = json.loads(path.read_text()) if path.exists() else {}
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        where = rng.choice([(field,) for field in FIELDS[name]] + places(value))
        *way, last = where
        inner = value
        try:
            for key in way:
                inner = inner[key]
            how = rng.choice(("replace",) * 6 + ("delete", "name", "file", "itself"))
            if how == "delete":
                del inner[last]
            elif how == "name":
                inner[last] = rng.choice(KINDS + CLASSES)
            elif how == "file":
                inner[last] = case.outside(rng)
            elif how == "itself":
                inner[last] = copy.deepcopy(value)
            else:
                inner[last] = Raw(rng.choice(VALUES))
            done.append(f"{how} {'.'.join(map(str, where))}")
        except (KeyError, TypeError, IndexError):
            continue
    try:
        text = dump(value)
    except RecursionError:
        text = "{" + '"a": {' * 500 + "}" * 501
    if rng.random() < 0.1:  # some names then occur twice in the object
        text = re.sub(r"^\{", '{"vocab_size": 1, "model": null, "eos_token": [], ', text)
    prefix = rng.choice(("",) * 12 + ("\ufeff", "\x00", " " * 1_000_000, "//\n"))
    path.write_text(prefix + text, encoding="utf-8", errors="surrogatepass")
    return f"{name}: {', '.join(done)}"[:200]


# --- Bytes --------------------------------------------------------------------------------------


def change_bytes(rng: random.Random, case: Case) -> str:
    """Damage the bytes of one file: cut it off, flip bits, zero, insert or repeat bytes, encode it
    as UTF-16, or empty it."""
    path = rng.choice([path for path in case.directory.iterdir() if path.stat().st_size])
    body = bytearray(path.read_bytes())
    at = rng.randrange(min(len(body), rng.choice((16, 1000, len(body)))))
    how = rng.choice(("cut", "flip", "flip", "flip", "zero", "insert", "repeat", "utf-16", "empty"))
    match how:
        case "cut":
            del body[at:]
        case "flip":
            for _ in range(rng.choice((1, 1, 8))):
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            body[at] ^= 1 << rng.randrange(8)
        case "zero":
            body[at : at + 64] = bytes(len(body[at : at + 64]))
        case "insert":
            body[at:at] = rng.randbytes(rng.choice((1, 8, 4096)))
        case "repeat":
            body[at:at] = body[at:] * 3
        case "utf-16":
            body = bytearray(body.decode(errors="replace").encode("utf-16"))
        case "empty":
            body.clear()
    path.write_bytes(body)
    return f"{path.name}: {how}"


# --- Weights ------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the data after it."""
    body = path.read_bytes()
    (length,) = struct.unpack("<Q", body[:8])
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def write_header(path: Path, header: str | bytes, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file.

    header: the text of the header.
    data: the bytes after it.
    length: the length of the header that the file states; None is the right one.
    """
    told = header.encode(errors="surrogatepass") if isinstance(header, str) else header
    said = len(told) if length is None else length
    path.write_bytes(struct.pack("<Q", said % 2**64) + told + data)


def change_header(rng: random.Random, case: Case) -> str:
    """Change the header of a file of weights: its statements on tensors, or its stated length."""
    path = rng.choice(sorted(case.directory.glob("*.safetensors")))
    header, data = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice([*names, "model.embed_tokens.weight" if len(names) > 3 else names[0]])
    tensor, other = header.get(name, header[names[0]]), header[rng.choice(names)]
    how = rng.choice(
        (
            *(
                "length",
                "offsets",
                "overlap",
                "dtype",
                "shape",
                "extra",
                "metadata",
                "text",
                "name",
            ),
            *("huge", "hole", "many", "unaligned", "twice", "rank", "scalar"),
        )
    )
    length = None
    start, end = tensor["data_offsets"]
    text: str | bytes | None = None
    match how:
        case "length":
            length = rng.choice((0, 1, 2**64 - 1, 2**63, 10**8, 10**8 + 1, len(data), 1 << 40))
        case "offsets":
            odd = [0, -1, end, start, end + 1, 2**63, 2**64 - 1, 10**30, 1.5, None, "0"]
            tensor["data_offsets"] = [rng.choice(odd) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
        case "overlap":
            tensor["data_offsets"] = other["data_offsets"]
        case "dtype":
            dtypes = (
                *("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
                *("F4", "F6_E2M3", "C64", "X", "1"),
            )
            tensor["dtype"] = rng.choice([*dtypes, None, 7, []])
            if rng.random() < 0.5:  # a shape that fits a dtype of one byte
                tensor["shape"] = [end - start]
        case "shape":
            odd = [0, 1, -1, 2**32, 2**63, 2**64, 10**30, 1.5, None, "3"]
            tensor["shape"] = [rng.choice(odd) for _ in range(rng.choice((0, 1, 2, 3, 8)))]
        case "rank":
            tensor["shape"] = [1] * rng.choice((64, 65, 1000, 100_000)) + tensor["shape"]
        case "scalar":
            tensor["shape"] = []
        case "extra":
            header["x" * rng.choice((1, 10**6))] = {**other, "shape": [0], "data_offsets": [0, 0]}
        case "metadata":
            odd = [{"format": "tf"}, {"format": 1}, [], None, 3, {"a": {}}, {"format": "x" * 10**6}]
            header["__metadata__"] = rng.choice(odd)
        case "name":
            header[rng.choice(("", "\ud800", "\x00", "lm_head.weight", "a" * 10**5))] = header.pop(
                name
            )
        case "huge":
            text = json.dumps(header)[:-1] + ', "__metadata__": {"a": "' + "x" * (99 << 20) + '"}}'
        case "hole":
            data = data + b"\0" * 8
        case "many":
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
            header |= {f"x{i}": empty for i in range(200_000)}
        case "unaligned":
            header = {
                key: {**value, "data_offsets": [each + 1 for each in value["data_offsets"]]}
                if key != "__metadata__"
                else value
                for key, value in header.items()
            }
            data = b"\0" + data
        case "twice":
            text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(other)}}}"
        case "text":
            odd_texts = (
                "[" * DEEP,
                '{"a":' * DEEP,
                "null",
                "[]",
                "{}",
                "",
                "\xff",
                "{" * 5,
                "1" * 5000,
            )
            text = rng.choice(odd_texts)
    write_header(path, json.dumps(header) if text is None else text, data, length)
    return f"{path.name}: {how} {name}"[:200]


def change_index(rng: random.Random, case: Case) -> str:
    """Use the sharded weights, and damage their index or one of the files that it names."""
    (case.directory / "model.safetensors").unlink()
    for path in case.sharded.iterdir():
        shutil.copy(path, case.directory)
    index = case.directory / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    names, files = sorted(told["weight_map"]), sorted(set(told["weight_map"].values()))
    where = rng.choice(names)
    how = rng.choice(
        ("outside", "odd", "fifo", "device", "directory", "link", "missing", "many", "text")
    )
    shard = case.directory / files[0]
    match how:
        case "outside":
            told["weight_map"][where] = case.outside(rng)
        case "odd":
            odd = (
                "",
                ".",
                "..",
                "a/b.safetensors",
                "\x00",
                "x.bin",
                "\ud800.safetensors",
                1,
                None,
                [],
            )
            told["weight_map"][where] = rng.choice(odd)
        case "fifo":
            shard.unlink()
            os.mkfifo(shard)
        case "device":
            shard.unlink()
            shard.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/proc/self/mem")))
        case "directory":
            shard.unlink()
            shard.mkdir()
        case "link":
            shard.unlink()
            # The last choice is as valid as the file itself, as weights may be links to elsewhere.
            shard.symlink_to(
                rng.choice((shard.name, "nowhere", files[-1], str(case.sharded / files[0])))
            )
        case "missing":
            shard.unlink()
        case "many":
            told["weight_map"] |= {f"x{i}": f"{i}.safetensors" for i in range(100_000)}
        case "text":
            index.write_text(rng.choice(VALUES))
    if how != "text":
        index.write_text(json.dumps(told))
    return f"index: {how}"


def change_config(rng: random.Random, case: Case) -> str:
    """Set sizes in config.json that do not fit the weights, many of them much too large."""
    path = case.directory / "config.json"
    config = json.loads(path.read_text())
    for name in rng.sample(FIELDS["config.json"][:8], rng.choice((1, 2, 3))):
        config[name] = rng.choice((1, 2, 7, 64, 4096, 99_999, 100_000, 10**6, 2**31 - 1, 10**9))
    if rng.random() < 0.4:
        kind = rng.choice(("yarn", "linear", "dynamic", "llama3", "longrope", "default", "x"))
        scaling: dict[str, Any] = {
            "rope_type": kind,
            "rope_theta": rng.choice((1e4, 1.0, 0, 1e-300)),
        }
        for name in ("factor", "original_max_position_embeddings", "low_freq_factor", "beta_fast"):
            scaling[name] = rng.choice((1, 8, 0, -1, 1e18, 1e-18, 1e300, 64))
        config["high_freq_factor"] = 4
        config["rope_scaling"] = scaling
    path.write_text(json.dumps(config))
    return f"config.json: { ({k: config.get(k) for k in FIELDS['config.json'][:8]}) }"[:200]


# --- The tokenizer and the chat template -------------------------------------------------------

REGEXES = (
    "(a+)+$",
    "(a|a)*b",
    "(.*)*x",
    "(?=(a+))*b",
    "a{1000}{1000}",
    "(" * 500 + ")" * 500,
    "[",
    "",
)


def change_tokenizer(rng: random.Random, case: Case) -> str:
    """Change tokenizer.json so that it is valid, or nearly, and takes much time or memory."""
    path = case.directory / "tokenizer.json"
    told = json.loads(path.read_text())
    vocab = told["model"]["vocab"]
    pattern = {"Regex": rng.choice(REGEXES)}
    how = rng.choice(
        (
            *(
                "id",
                "negative",
                "added id",
                "overlap",
                "regex",
                "replace",
                "deep",
                "prepend",
                "model",
            ),
            *("merges", "decoder", "pad", "template", "vocab", "sequence"),
        )
    )
    match how:
        case "id":
            vocab[rng.choice(list(vocab))] = rng.choice((2**31, 2**32 - 1, 10**9, 10**7))
        case "negative":
            vocab[rng.choice(list(vocab))] = rng.choice((-1, 2**32, 1.5, None))
        case "added id":
            token = {**told["added_tokens"][0], "content": "<new>"}
            token["id"] = rng.choice((10**9, 2**32 - 1, 0, 5))
            told["added_tokens"].append(token)
        case "overlap":
            token = told["added_tokens"][0]
            texts = ("", "a", " ", "\n", "x" * 10**6, "<|im_end|>", "\x00")
            told["added_tokens"] += [
                {**token, "id": 400 + i, "content": t} for i, t in enumerate(texts)
            ]
        case "regex":
            kind = rng.choice(("Removed", "Isolated", "Contiguous", "MergedWithNext"))
            split = {"type": "Split", "pattern": pattern, "behavior": kind, "invert": False}
            told["pre_tokenizer"] = {
                "type": "Sequence",
                "pretokenizers": [split, told["pre_tokenizer"]],
            }
        case "replace":
            content = rng.choice(("", "aa", "a" * 10**6))
            told["normalizer"] = {"type": "Replace", "pattern": pattern, "content": content}
        case "prepend":
            told["normalizer"] = {"type": "Prepend", "prepend": "a" * 10**6}
        case "sequence":
            grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
            told["normalizer"] = {
                "type": "Sequence",
                "normalizers": [grow] * rng.choice((20, 40, 1000)),
            }
        case "deep":
            step: dict[str, Any] = {"type": "Lowercase"}
            for _ in range(rng.choice((50, 120, 300))):
                step = {"type": "Sequence", "normalizers": [step]}
            told["normalizer"] = step
        case "model":
            told["model"]["type"] = rng.choice(("WordPiece", "Unigram", "WordLevel", "X"))
        case "merges":
            words = list(vocab)
            told["model"]["merges"] += rng.choice(
                (
                    [["no", "such"]],
                    [rng.sample(words, 2) for _ in range(50)],
                    [["a"]],
                    ["a b c"],
                    [7],
                )
            )
        case "decoder":
            kinds = ("WordPiece", "Metaspace", "CTC", "Fuse", "Strip", "ByteFallback", "BPEDecoder")
            told["decoder"] = {
                "type": rng.choice(kinds),
                "content": "a",
                "start": 2**40,
                "stop": 2**40,
            }
        case "pad":
            told["padding"] = {
                **{"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
            }
        case "template":
            single = [{"SpecialToken": {"id": "x", "type_id": 0}}] * rng.choice((1, 10**5))
            tokens = {"x": {"id": "x", "ids": [0] * rng.choice((1, 10**5)), "tokens": ["x"]}}
            told["post_processor"] = {
                **{"type": "TemplateProcessing", "single": single, "pair": single},
                "special_tokens": tokens,
            }
        case "vocab":
            told["model"]["vocab"] = rng.choice(({}, {"a": 0}, {str(i): i for i in range(300_000)}))
    path.write_text(json.dumps(told))
    return f"tokenizer: {how}"


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
TEMPLATES = (
    *(
        "{% for i in range(10**9) %}{% endfor %}",
        LOOP + ENDS,
        LOOP + "x" + ENDS,
        "{{ 'a' * 10**9 }}",
    ),
    *(
        "{{ 'a' * 10**12 }}",
        "{{ 10**10**10 }}",
        "{{ 'a'|center(10**11) }}",
        "{{ '%99999999999d' % 1 }}",
    ),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}"),
    *("{% include '/etc/passwd' %}", "{% extends 'x' %}", "{% import '../x' as y %}{{ y }}"),
    *(
        "{{ lipsum(n=10**7) }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    ),
    *(
        "{{ messages|map('tojson')|list * 10**9 }}",
        "{% for x in y recursive %}{{ loop(x) }}{% endfor %}",
    ),
    *(
        "{% set l = [1] %}" + "{% set l = [l, l] %}" * 60 + "{{ l|string|length }}",
        "{{ raise_exception([1]) }}",
    ),
    *(
        "{% set s = 'aaaaaaaaaaaaaaaa' %}" + "{% set s = s ~ s %}" * 60,
        "{{ raise_exception('x' * 10**6) }}",
    ),
    *(
        "{" * 10**6,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
    ),
    *(
        "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
        "{{ 1 + " * 3 + "}}",
        "{{ " + "1+" * 20_000 + "1 }}",
    ),
    *(
        "{{ range(99999)|select('in', range(99999)|list)|list }}",
        "{{ messages[0].content[10**20] }}",
    ),
    *(
        "{{ strftime_now('%99999999Y') }}",
        "{{ strftime_now('\ud800') }}",
        "{{ '\\ud800' }}",
        "{{ self._x }}",
    ),
    *(
        "{{ messages|tojson(indent=10**9) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ),
    *(
        "{{ messages.append(1) }}",
        "{{ messages|sort }}",
        "{% block x %}{{ self.x() }}{% endblock %}",
        "\x00",
    ),
    *(
        "{% call f() %}",
        "{% set f = 1 %}{{ f() }}",
        "{{ dict(a=1)|xmlattr|urlize }}",
        "{{ 1 // 0 }}",
    ),
    *(
        "{% generation %}x{% endgeneration %}",
        "{% for m in messages %}{% break %}{% endfor %}",
        "{{ joiner }}",
    ),
)


def change_template(rng: random.Random, case: Case) -> str:
    """Set a chat template that does not end, takes much memory, accesses what it may not, or is no
    template."""
    source = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        source = "{% for m in messages %}{{ m.content }}{% endfor %}" + source
    how = rng.choice(("config", "file", "named"))
    config = case.directory / "tokenizer_config.json"
    told = json.loads(config.read_text())
    match how:
        case "config":
            told["chat_template"] = source
        case "file":
            text = source.encode(errors="surrogatepass")
            (case.directory / "chat_template.jinja").write_bytes(text)
        case "named":
            folder = case.directory / "additional_chat_templates"
            folder.mkdir()
            (folder / "tool_use.jinja").write_bytes(source.encode(errors="surrogatepass"))
    config.write_text(json.dumps(told))
    return f"template: {how} {source[:60]}{'...' if len(source) > 60 else ''}"


# --- Links --------------------------------------------------------------------------------------


def change_links(rng: random.Random, case: Case) -> str:
    """Replace a file by a link, or by something that is no regular file."""
    extra = ("chat_template.jinja", "chat_template.json", "added_tokens.json", "tokenizer.model")
    extra += ("vocab.json", "merges.txt", "additional_chat_templates", "passwd.gguf", "vocab.txt")
    name = rng.choice((*JSON_FILES, *extra))
    path = case.directory / name
    if path.exists():
        path.unlink()
    how = rng.choice(
        ("secret", "relative", "folder", "loop", "nowhere", "device", "fifo", "two", "named")
    )
    match how:
        case "secret":
            path.symlink_to(case.secret(rng, name))
        case "relative":
            path.symlink_to(f"../{case.secrets.name}/{case.secret(rng, name).name}")
        case "folder":
            path.symlink_to(case.secrets)
        case "loop":
            path.symlink_to(name)
        case "nowhere":
            path.symlink_to("/nowhere")
        case "device":
            path.symlink_to(
                rng.choice(("/dev/zero", "/dev/random", "/dev/tty", "/proc/self/environ"))
            )
        case "fifo":
            os.mkfifo(path)
        case "two":
            (case.directory / "between").symlink_to(case.secrets)
            path.symlink_to(f"between/{case.secret(rng, name).name}")
        case "named":
            (case.directory / "inner.txt").symlink_to(case.secret(rng, ""))
            config = case.directory / "tokenizer_config.json"
            told = json.loads(config.read_text()) if config.exists() else {}
            told[rng.choice(FIELDS["tokenizer_config.json"])] = "inner.txt"
            config.write_text(json.dumps(told))
    return f"link: {how} {name}"


WAYS: dict[str, Callable[[random.Random, Case], str]] = {
    "json": change_json,
    "bytes": change_bytes,
    "weights": change_header,
    "index": change_index,
    "config": change_config,
    "tokenizer": change_tokenizer,
    "template": change_template,
    "links": change_links,
}
