"""Tiny text encoders with random weights, saved as transformers saves real ones."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["a", "red", "green", "blue", "one", "two", "three", "left", "of", "above", "below"]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>"]


def save_tokenizer(folder: Path, begin: bool) -> None:
    """One token a word, as T5 ends with <eos>; CLIP begins with <bos>, too, and pads with <eos>."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if begin else "$A <eos>",
        special_tokens=[("<bos>", 3), ("<eos>", 1)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<eos>" if begin else "<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def save_t5(folder: Path, seed: int = 0) -> Path:
    """A whole T5, as folders on the hub hold it."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder, begin=False)
    return folder


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A whole CLIP, text and vision, with what prepares its images."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {"vocab_size": 20, "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config={**sizes, **text, "pad_token_id": 1},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    save_tokenizer(folder, begin=True)
    return folder
