"""T5 v1.1 text encoder of Open-Sora 1.2 (hub id DeepFloyd/t5-v1_1-xxl), frozen.

Axes: B batch, L tokens (``model_max_length``), D width of the encoder (4096 for XXL).
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, BitsAndBytesConfig, T5EncoderModel

from opensora.registry import MODELS
from opensora.utils.ckpt_utils import is_hub_id

from .caption_cleaning import clean_caption


class T5Embedder:
    """Tokenizer and frozen T5 encoder behind one call.

    Args:
        device: where the encoder lives and runs.
        from_pretrained: hub id, or folder with config.json, the weights (one file or shards, ``.safetensors``
            or ``.bin``) and the tokenizer (tokenizer.json or spiece.model).
        cache_dir: cache folder for downloads; None is the hub's default.
        torch_dtype: floating-point type of the weights. In float16 the feed-forward output projections ``wo``
            stay in float32, because their products overflow float16.
        model_max_length: L; captions are padded or truncated to it.
        local_files_only: never go to the network.
        load_in_8bit: keep the products' weights as 8-bit integers (bitsandbytes, LLM.int8).

    Raises:
        FileNotFoundError: the folder or hub id yields no model.
        ValueError: the weights are damaged or incomplete, or the tokenizer is another model's.
    """

    def __init__(
        self,
        device,
        from_pretrained,
        *,
        cache_dir=None,
        torch_dtype=torch.float,
        model_max_length=120,
        local_files_only=False,
        load_in_8bit=False,
    ):
        self.device = torch.device(device)
        self.model_max_length = model_max_length
        is_folder = _check_folder(from_pretrained)
        source = dict(cache_dir=cache_dir, local_files_only=local_files_only or is_folder)
        storage = {}
        if load_in_8bit:
            storage = dict(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": device})
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(from_pretrained, **source)
            # Sizes are compared below, for a sentence in place of transformers' report.
            self.model, loading = T5EncoderModel.from_pretrained(
                from_pretrained,
                dtype=torch_dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **storage,
                **source,
            )
        except OSError as error:
            raise FileNotFoundError(_missing_message(from_pretrained)) from error
        except SafetensorError as error:
            raise ValueError(
                f"text encoder {from_pretrained!r} has a damaged weight file ({error}); fetch it again"
            ) from error
        _check_complete(from_pretrained, self.model, self.tokenizer, loading)
        if not load_in_8bit:  # then it is there, and must not be moved
            self.model.to(self.device)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def get_text_embeddings(self, texts):
        """Embeddings [B, L, D] and attention mask [B, L] (1 = token, 0 = padding) of ``texts``."""
        tokens = self.tokenizer(
            [texts] if isinstance(texts, str) else list(texts),
            max_length=self.model_max_length,
            padding="max_length",
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        output = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return output.last_hidden_state, tokens["attention_mask"]


@MODELS.register_module("t5")
class T5Encoder:
    """Prompts to the text conditioning of STDiT; signature of Open-Sora v1.2.0.

    ``y_embedder`` (the denoiser's, set from outside) supplies the learned embedding of the empty caption.

    Args:
        from_pretrained: hub id or local folder, see ``T5Embedder``.
        model_max_length: tokens per prompt; 300 in Open-Sora 1.2.
        device, dtype: of the encoder and its outputs.
        cache_dir: cache folder for downloads.
        shardformer: only False; the colossalai layers it stands for upstream are not used here.
        local_files_only: never go to the network.
        load_in_8bit: see ``T5Embedder``.
    """

    def __init__(
        self,
        from_pretrained=None,
        model_max_length=120,
        device="cuda",
        dtype=torch.float,
        cache_dir=None,
        shardformer=False,
        local_files_only=False,
        load_in_8bit=False,
    ):
        if from_pretrained is None:
            raise ValueError(
                "text_encoder.from_pretrained is None; set a hub id ('DeepFloyd/t5-v1_1-xxl') or a folder"
            )
        if shardformer:
            raise ValueError(
                "text_encoder.shardformer=True needs colossalai, which is not used here; set False"
            )
        self.t5 = T5Embedder(
            device,
            str(from_pretrained),
            cache_dir=cache_dir,
            torch_dtype=dtype,
            model_max_length=model_max_length,
            local_files_only=local_files_only,
            load_in_8bit=load_in_8bit,
        )
        self.y_embedder = None
        self.model_max_length = model_max_length
        self.output_dim = self.t5.model.config.d_model
        self.dtype = dtype

    def encode(self, text):
        """{"y": [B, 1, L, D], "mask": [B, L]} for a list of B prompts (already cleaned)."""
        embeddings, mask = self.t5.get_text_embeddings(text)
        return dict(y=embeddings[:, None], mask=mask)

    def null(self, n):
        """The learned embedding of the empty caption for n samples, [n, 1, L, D]."""
        if self.y_embedder is None:
            raise ValueError(
                "T5Encoder.y_embedder is not set; use the denoiser's: encoder.y_embedder = model.y_embedder"
            )
        return self.y_embedder.y_embedding[None, None].repeat(n, 1, 1, 1)


def text_preprocessing(text, use_text_preprocessing=True):
    """``text`` as the captions of the training set were written.

    Args:
        text: one caption.
        use_text_preprocessing: False only lower-cases and strips.
    """
    if use_text_preprocessing:
        return clean_caption(clean_caption(text))
    return text.lower().strip()


def _check_folder(from_pretrained):
    """Whether ``from_pretrained`` is a folder (else a hub id).

    Raises:
        FileNotFoundError: files are missing. transformers would fill the gaps in silence: without config.json with
            the sizes of T5-small, without a tokenizer file with a tokenizer that knows no word.
    """
    folder = Path(from_pretrained)
    if not folder.is_dir():
        if from_pretrained.startswith((".", "/", "~")):  # a path, so do not ask the hub for it
            raise FileNotFoundError(_missing_message(from_pretrained))
        return False
    tokenizer_files = ("tokenizer.json", "spiece.model")
    if not (folder / "config.json").is_file() or not any(
        (folder / name).is_file() for name in tokenizer_files
    ):
        raise FileNotFoundError(_missing_message(from_pretrained))
    return True


def _check_complete(from_pretrained, model, tokenizer, loading):
    """Raise ValueError when weights were made up or the tokenizer does not go with the embedding."""
    bad = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if bad:
        raise ValueError(
            f"text encoder {from_pretrained!r} lacks {len(bad)} weights that its config.json wants, or has "
            f"them in another size (first: {bad[0]}); fetch the checkpoint again"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"text encoder {from_pretrained!r} has a tokenizer of {len(tokenizer)} tokens and embeddings for "
            f"{model.config.vocab_size}; use the tokenizer the model was trained with"
        )


def _missing_message(from_pretrained):
    name = Path(from_pretrained).name
    hub_id = from_pretrained if is_hub_id(from_pretrained) else "DeepFloyd/t5-v1_1-xxl"
    return (
        f"no T5 text encoder at {from_pretrained!r}: expected a hub id that can be reached, or a folder with "
        "config.json, spiece.model (or tokenizer.json) and model*.safetensors (or pytorch_model*.bin); fetch "
        f"it with `hf download {hub_id} --local-dir {name}` and set text_encoder.from_pretrained to {name}"
    )
