"""Stage ``t5``: a small T5 v1.1 with its own tokenizer, pretrained by span corruption on the world's captions."""

import json
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

from scripts.demo import world
from scripts.demo.common import SEED, fit

MAX_TOKENS = 32
SENTINELS = 16
WIDTH = 96
SIZES = dict(d_model=WIDTH, d_kv=24, num_heads=4, d_ff=256, num_layers=2, num_decoder_layers=2)
MASKED = 0.35  # share of a caption's words that is masked


def captions(rng: np.random.Generator, n: int) -> list[str]:
    """``n`` captions of new training scenes."""
    scenes = [world.scene(SEED, int(rng.integers(1 << 40))) for _ in range(n)]
    return [world.caption(scene, int(rng.integers(1 << 31))) for scene in scenes]


def words() -> list[str]:
    """All words used in captions, most frequent first."""
    texts = captions(np.random.default_rng(SEED), 4000)
    counts = Counter(re.findall("[a-z]+", " ".join(texts)))
    return [word for word, _ in counts.most_common()]


def tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with one token per word of the world; any other word is spelled letter by letter."""
    letters = [(c, -12.0) for c in string.ascii_lowercase + string.digits + string.punctuation]
    known = [(f"▁{word}", -2.0 - 0.01 * rank) for rank, word in enumerate(words())]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    vocabulary = [*special, ("▁", -8.0), *letters, *known, *sentinels]
    return T5Tokenizer(vocabulary, extra_ids=SENTINELS, model_max_length=MAX_TOKENS)


def corrupt(text: str, rng: np.random.Generator) -> tuple[str, str]:
    """Replace spans of words with sentinels; returns (corrupted caption, contents of the spans)."""
    words = text.split()
    hidden = rng.random(len(words)) < MASKED
    hidden[rng.integers(len(words))] = True
    source, target, spans = [], [], 0
    for i, word in enumerate(words):
        if not hidden[i]:
            source.append(word)
            continue
        if i == 0 or not hidden[i - 1]:
            sentinel = f"<extra_id_{spans}>"
            source.append(sentinel)
            target.append(sentinel)
            spans += 1
        target.append(word)
    return " ".join(source), " ".join(target)


def build(tokens: T5Tokenizer) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=len(tokens),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        decoder_start_token_id=tokens.pad_token_id,
        **SIZES,
    )
    torch.manual_seed(SEED)
    return T5ForConditionalGeneration(config)


def train() -> tuple[T5ForConditionalGeneration, T5Tokenizer]:
    """Span corruption: the encoder reads the rest of a caption, the decoder predicts the masked words."""
    tokens = tokenizer()
    model = build(tokens)

    def loss_fn(rng):
        pairs = [corrupt(text, rng) for text in captions(rng, 48)]
        sources, targets = zip(*pairs, strict=True)
        source = tokens(list(sources), padding=True, return_tensors="pt")
        labels = tokens(list(targets), padding=True, return_tensors="pt").input_ids
        labels = labels.masked_fill(labels == tokens.pad_token_id, -100)
        out = model(input_ids=source.input_ids, attention_mask=source.attention_mask, labels=labels)
        return out.loss, {}

    fit("t5", model, loss_fn, steps=1200, lr=2e-3)
    return model.eval(), tokens


def export(folder: Path) -> None:
    """Save encoder and tokenizer in the Hub's layout, in half precision."""
    model, tokens = train()
    encoder = T5EncoderModel(model.config)
    state = {k: v for k, v in model.state_dict().items() if k in encoder.state_dict()}
    encoder.load_state_dict(state)
    encoder.half().save_pretrained(folder)
    tokens.save_pretrained(folder)
    # transformers 4 cannot read the list that 5 writes; `extra_ids` says the same to both.
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["extra_special_tokens"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
