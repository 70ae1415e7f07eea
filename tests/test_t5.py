"""Caption cleaning against golden/prompts.json, and the text encoder against transformers on a tiny T5."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from opensora.models.text_encoder.t5 import T5Encoder, text_preprocessing
from opensora.registry import MODELS, build_module

GOLDEN = json.loads((Path(__file__).parent / "golden" / "prompts.json").read_text())
PROMPTS = [
    "a cat sleeps",
    "a dog runs through fresh snow, slow motion",
    "two people dance on a beach at sunset, waves behind them, warm light, camera pans left",
]
LENGTH = 24


@pytest.mark.parametrize(("caption", "cleaned"), GOLDEN["text_preprocessing"])
def test_captions_of_the_release(caption, cleaned):
    assert text_preprocessing(caption) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a <b>bold</b> cat<br/> sits<!-- note -->", "a bold cat sits"),
        ("a cat <script>x = 1</script> and a dog", "a cat and a dog"),
        ("cats &#38; dogs &lt;3 &unknown; x", "cats dogs <3 unknown x"),
        ("a <![if cat", "a <! if cat"),
        ("5 < 6 and 7 > 2", "5 < 6 and 7 > 2"),
    ],
)
def test_markup_in_captions(caption, cleaned):
    assert text_preprocessing(caption) == cleaned


def test_cleaning_can_be_switched_off():
    assert text_preprocessing("  A  (Cat) ", use_text_preprocessing=False) == "a  (cat)"


def tiny_model(vocab_size):
    """A T5 v1.1 encoder of two layers."""
    sizes = dict(vocab_size=vocab_size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)).eval()


@pytest.fixture(scope="module")
def tiny():
    """A tokenizer of a few dozen words and an encoder to go with it."""
    tokenizer = T5Tokenizer().train_new_from_iterator(PROMPTS * 3, 120)
    return tokenizer, tiny_model(len(tokenizer))


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    for part in tiny:
        part.save_pretrained(path)
    return path


def encoder_of(folder, **overrides):
    return T5Encoder(**{"from_pretrained": folder, "model_max_length": LENGTH, "device": "cpu", **overrides})


def reference(tiny, prompts):
    """Embeddings [B, L, D] and mask [B, L] straight from transformers, one prompt at a time."""
    tokenizer, model = tiny
    embeddings, masks = [], []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        ids = ids if len(ids) <= LENGTH else ids[: LENGTH - 1] + [tokenizer.eos_token_id]
        mask = torch.tensor([[1] * len(ids) + [0] * (LENGTH - len(ids))])
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (LENGTH - len(ids))])
        with torch.no_grad():
            embeddings.append(model(input_ids=ids, attention_mask=mask).last_hidden_state)
        masks.append(mask)
    return torch.cat(embeddings), torch.cat(masks)


def test_encode_equals_transformers(tiny, folder):
    encoder = build_module(
        dict(type="t5", from_pretrained=str(folder), model_max_length=LENGTH), MODELS, device="cpu"
    )
    encoded = encoder.encode(PROMPTS)
    embeddings, mask = reference(tiny, PROMPTS)
    assert mask.sum(1).min() < LENGTH == mask.sum(1).max()  # one prompt is padded, one is cut
    assert encoded["y"].shape == (3, 1, LENGTH, encoder.output_dim)
    torch.testing.assert_close(encoded["y"][:, 0], embeddings, atol=1e-6, rtol=1e-5)
    assert torch.equal(encoded["mask"], mask)


def test_one_prompt_is_a_batch_of_one(folder):
    encoder = encoder_of(folder)
    assert torch.equal(encoder.encode(PROMPTS[0])["y"], encoder.encode(PROMPTS[:1])["y"])


def test_sharded_checkpoints_give_the_same(tiny, folder, tmp_path):
    tokenizer, model = tiny
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(encoder_of(tmp_path).encode(PROMPTS)["y"], encoder_of(folder).encode(PROMPTS)["y"])


def test_bin_checkpoints_give_the_same(tiny, folder, tmp_path):
    tokenizer, model = tiny
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(encoder_of(tmp_path).encode(PROMPTS)["y"], encoder_of(folder).encode(PROMPTS)["y"])


def test_a_folder_with_only_a_sentencepiece_model(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 3),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    tiny_model(vocab_size=200).save_pretrained(tmp_path)
    tokenizer = encoder_of(tmp_path, model_max_length=120).t5.tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    texts = [*PROMPTS, "a  café, 2 ﬁsh 中文"]
    assert tokenizer(texts)["input_ids"] == [pieces.encode(text) + [1] for text in texts]


def test_number_types(folder):
    half = encoder_of(folder, dtype=torch.float16)
    types = {name.split(".")[-2]: weight.dtype for name, weight in half.t5.model.named_parameters()}
    assert (types["wo"], types["wi_0"]) == (torch.float32, torch.float16)
    brain = encoder_of(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in brain.t5.model.parameters()} == {torch.bfloat16}
    assert brain.encode(PROMPTS)["y"].dtype == torch.bfloat16


def test_eight_bits(tiny, folder):
    encoder = encoder_of(folder, dtype=torch.bfloat16, load_in_8bit=True)
    stored = {weight.dtype for name, weight in encoder.t5.model.named_parameters() if ".q." in name}
    assert stored == {torch.int8} and not any(w.requires_grad for w in encoder.t5.model.parameters())
    embeddings, mask = reference(tiny, PROMPTS)
    found = encoder.encode(PROMPTS)["y"][:, 0][mask != 0].float()
    assert (found - embeddings[mask != 0]).norm() < 0.05 * embeddings[mask != 0].norm()


def test_the_encoder_is_frozen(folder):
    model = encoder_of(folder).t5.model
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_null_repeats_the_learned_empty_caption(folder):
    encoder = encoder_of(folder)
    with pytest.raises(ValueError, match="encoder.y_embedder = model.y_embedder"):
        encoder.null(2)
    learned = torch.randn(LENGTH, 32)
    encoder.y_embedder = SimpleNamespace(y_embedding=learned)
    assert torch.equal(encoder.null(2), torch.stack([learned[None]] * 2))


def test_what_must_be_set_and_what_must_not(folder):
    with pytest.raises(ValueError, match="from_pretrained is None; set a hub id"):
        encoder_of(None)
    with pytest.raises(ValueError, match="shardformer=True needs colossalai"):
        encoder_of(folder, shardformer=True)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder(tiny, tmp_path, missing):
    for part in tiny:
        part.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(
        FileNotFoundError, match="expected a hub id.*or a folder with config.json.*hf download"
    ):
        encoder_of(tmp_path)


def test_what_does_not_exist():
    with pytest.raises(FileNotFoundError, match="hf download someone/no-such-t5 --local-dir no-such-t5"):
        encoder_of("someone/no-such-t5", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="hf download DeepFloyd/t5-v1_1-xxl"):
        encoder_of("./no-such-folder")


def test_missing_weights_are_not_made_up(tiny, tmp_path):
    tokenizer, model = tiny
    tokenizer.save_pretrained(tmp_path)
    state = {name: weight for name, weight in model.state_dict().items() if "final_layer_norm" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights .*final_layer_norm"):
        encoder_of(tmp_path)


def test_weights_of_another_size(tiny, folder, tmp_path):
    tokenizer, model = tiny
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_ff": 48}))
    with pytest.raises(ValueError, match="lacks 6 weights .* or has them in another size"):
        encoder_of(tmp_path)


def test_a_download_that_was_cut_off(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged weight file .*; fetch it again"):
        encoder_of(tmp_path)


def test_a_foreign_tokenizer(tiny, tmp_path):
    tokenizer, model = tiny
    model.save_pretrained(tmp_path)
    tokenizer.train_new_from_iterator([*PROMPTS, "quick brown foxes jump"], 200).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use the tokenizer the model was trained with"):
        encoder_of(tmp_path)
