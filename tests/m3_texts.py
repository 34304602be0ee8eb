"""What the tests of bge-m3's outputs search, in which words, and how many tokens that is."""

from pathlib import Path

TEXTS = [
    "Paris is the capital and the largest city of France.",
    "大熊猫是中国特有的一种熊科动物。",
    "القطة نائمة على الأريكة",
    "🐼 panda 大熊猫 and القطة",
    "The cat sat on the mat.",
    "Berlin is the capital of Germany.",
]
QUERY = "what is the capital of France?"


def tokens_of(folder: Path, texts: list[str]) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)
