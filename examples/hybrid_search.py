"""Hybrid search with bge-m3 alone, in LangChain and LlamaIndex.

One model gives dense vectors, token weights and token vectors: Qdrant searches by the first two
at once, and the third joins them to rerank. Each text goes through the model once for both
vectors of the index. Run it with the real model, or without a hub to see that it works:

    python examples/hybrid_search.py --model BAAI/bge-m3
    python examples/hybrid_search.py --question "大熊猫吃什么？"
    python examples/hybrid_search.py --python-docs --question "how do generators return?"
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import corpora

TEXTS = (
    "The giant panda is a bear of central China and feeds almost only on bamboo.",
    "大熊猫是中国特有的熊科动物，主要吃竹子，每天要吃十几公斤。",
    "الباندا العملاقة دب يعيش في وسط الصين ويأكل الخيزران.",
    "Der Große Panda lebt in den Bergen Chinas und frisst fast nur Bambus. 🐼",
    "Paris is the capital of France and lies on the river Seine.",
    "巴黎是法国的首都，塞纳河从市中心流过。",
    "باريس عاصمة فرنسا وأكبر مدنها وتقع على نهر السين.",
    "Париж — столица Франции, город на реке Сене. 🗼",
    "Bread rises because yeast turns sugar into carbon dioxide.",
    "面团里的酵母把糖变成二氧化碳，面包因此膨胀。",
    "الخميرة تحول السكر إلى غاز فينتفخ العجين. 🍞",
    "Le levain fait gonfler la pâte à pain pendant la nuit.",
    "Error E1042 means that the printer's fuser is too hot: switch it off for ten minutes.",
    "Error E1043 means that the paper tray of the printer is empty.",
    "打印机报错 E1042：定影器过热，请关机十分钟。",
    "プリンターのエラー E1043 は、用紙トレイが空であることを示します。",
    "Water boils at 100 degrees Celsius at sea level and earlier in the mountains.",
    "في الجبال يغلي الماء عند درجة حرارة أقل من مئة.",
    "Auf dem Berg kocht Wasser schon unter 100 Grad.",
    "猫はソファで眠り、外では雨が降っている。🐈🌧️",
)
QUESTIONS = (
    "What does the giant panda eat?",
    "打印机 E1042 是什么错误？",
    "ما هي عاصمة فرنسا؟",
    "Warum kocht Wasser auf dem Berg früher? 🏔️",
)
PYTHON_QUESTIONS = (
    "How do I run cleanup code even when my function raises?",
    "What does the nonlocal statement do?",
)
FIRST = 5
PASSAGE_CHARACTERS = 600


@dataclass(frozen=True)
class Hit:
    """A text that was found, and its score."""

    text: str
    score: float


@dataclass(frozen=True)
class Search:
    """One framework's two stages: hybrid search, then all three scores of bge-m3."""

    name: str
    find: Callable[[str], list[Hit]]
    rerank: Callable[[str, Sequence[Hit]], list[Hit]]


def langchain(model: str, texts: Sequence[str]) -> Search:
    """Index the texts with LangChain."""
    from langchain_core.documents import Document
    from langchain_qdrant import QdrantVectorStore, RetrievalMode

    from langchain_bge import BGEEmbeddings, BGEReranker, BGESparseEmbeddings

    store = QdrantVectorStore.from_texts(
        list(texts),
        embedding=BGEEmbeddings(model=model),
        sparse_embedding=BGESparseEmbeddings(model=model),
        retrieval_mode=RetrievalMode.HYBRID,
        location=":memory:",
    )
    reranker = BGEReranker(model=model, top_n=3)

    def find(question: str) -> list[Hit]:
        found = store.similarity_search_with_score(question, k=FIRST)
        return [Hit(document.page_content, score) for document, score in found]

    def rerank(question: str, hits: Sequence[Hit]) -> list[Hit]:
        documents = [Document(hit.text) for hit in hits]
        return [
            Hit(document.page_content, document.metadata["relevance_score"])
            for document in reranker.compress_documents(documents, question)
        ]

    return Search("LangChain", find, rerank)


def llamaindex(model: str, texts: Sequence[str]) -> Search:
    """Index the texts with LlamaIndex."""
    from llama_index.core import StorageContext, VectorStoreIndex
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

    from llamaindex_bge import BGEEmbedding, BGEReranker, BGESparseEmbedding

    sparse = BGESparseEmbedding(model_name=model)
    store = QdrantVectorStore(
        "texts",
        client=QdrantClient(":memory:"),
        enable_hybrid=True,
        sparse_doc_fn=sparse.sparse_doc_fn,
        sparse_query_fn=sparse.sparse_query_fn,
    )
    index = VectorStoreIndex(
        [TextNode(text=text) for text in texts],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=BGEEmbedding(model_name=model),
    )
    retriever = index.as_retriever(
        vector_store_query_mode="hybrid", similarity_top_k=FIRST, sparse_top_k=FIRST
    )
    reranker = BGEReranker(model=model, top_n=3)

    def find(question: str) -> list[Hit]:
        return [Hit(node.text, float(node.score or 0.0)) for node in retriever.retrieve(question)]

    def rerank(question: str, hits: Sequence[Hit]) -> list[Hit]:
        nodes = [NodeWithScore(node=TextNode(text=hit.text)) for hit in hits]
        best = reranker.postprocess_nodes(nodes, query_str=question)
        return [Hit(node.text, float(node.score or 0.0)) for node in best]

    return Search("LlamaIndex", find, rerank)


SEARCHES = {"langchain": langchain, "llamaindex": llamaindex}


def passages_of(corpus: corpora.Corpus) -> list[str]:
    """Cut a corpus into passages of some paragraphs."""
    passages = [""]
    for document in corpus.texts:
        for paragraph in document.text.split("\n\n"):
            if len(passages[-1]) + len(paragraph) > PASSAGE_CHARACTERS:
                passages.append("")
            passages[-1] += f"{paragraph.strip()}\n\n"
        passages.append("")
    return [passage.strip() for passage in passages if passage.strip()]


def stand_in(folder: Path, texts: Sequence[str]) -> Path:
    """Write a tiny checkpoint of bge-m3's shape, from a fixed seed and with no training at all.

    Its dense and token vectors mean little; its token weights are about 0.2 each, so that the
    sparse half finds texts by the words that they share with a question.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import XLMRobertaConfig, XLMRobertaModel

    transformers.utils.logging.disable_progress_bar()
    pieces = Tokenizer(models.Unigram())
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=700,
        special_tokens=special,
        unk_token="<unk>",  # noqa: S106 -- a word of the vocabulary
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    vocabulary = [tuple(entry) for entry in json.loads(pieces.to_str())["model"]["vocab"]]
    tokenizer = Tokenizer(models.Unigram([*vocabulary, ("<mask>", 0.0)], unk_id=3))
    tokenizer.add_special_tokens([*special, "<mask>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    width = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = XLMRobertaModel(
            XLMRobertaConfig(
                vocab_size=tokenizer.get_vocab_size(),
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                max_position_embeddings=8194,
                type_vocab_size=1,
                bos_token_id=0,
                pad_token_id=1,
                eos_token_id=2,
            )
        )
        sparse, vectors = torch.nn.Linear(width, 1), torch.nn.Linear(width, width)
        torch.nn.init.constant_(sparse.bias, 0.2)
        torch.nn.init.normal_(sparse.weight, std=0.002)
    model.eval().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 8192}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    torch.save(vectors.state_dict(), folder / "colbert_linear.pt")
    return folder


def main() -> None:
    """Ask the questions in each framework, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", help="BAAI/bge-m3, or a folder that has it; without it, an untrained stand-in"
    )
    parser.add_argument("--question", action="append", help="ask this; may be given again")
    parser.add_argument(
        "--python-docs",
        action="store_true",
        help="search the demo's corpus, the language reference of Python (some 1,000 passages)",
    )
    parser.add_argument("--host", choices=SEARCHES, help="one framework only")
    arguments = parser.parse_args()
    # Qdrant says on every in-memory collection that an index is of no use there.
    warnings.filterwarnings("ignore", message="Payload indexes have no effect")
    logging.getLogger("transformers").setLevel(logging.ERROR)

    texts = passages_of(corpora.python_reference()) if arguments.python_docs else TEXTS
    questions = PYTHON_QUESTIONS if arguments.python_docs else QUESTIONS
    with tempfile.TemporaryDirectory() as temporary:
        model = arguments.model
        if model is None:
            model = str(stand_in(Path(temporary) / "bge-m3", [*texts, *questions]))
            print(
                "No --model was given: this is an untrained stand-in of bge-m3's shape, which "
                "finds shared words and understands nothing.\nIt shows that the parts fit; for "
                "answers, run it with --model BAAI/bge-m3."
            )
        for host in [arguments.host] if arguments.host else SEARCHES:
            search = SEARCHES[host](model, texts)
            print(f"\n{search.name}: {len(texts)} texts, dense and sparse from one pass each")
            for question in arguments.question or questions:
                found = search.find(question)
                print(f"\n  {question}")
                stages = {"hybrid": found[:3], "reranked": search.rerank(question, found)}
                for stage, hits in stages.items():
                    for place, hit in enumerate(hits, start=1):
                        label = stage if place == 1 else ""
                        print(f"    {label:8} {place}. {hit.score:6.3f}  {_shown(hit.text)}")


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:99]}…"


if __name__ == "__main__":
    main()
