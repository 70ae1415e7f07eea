import torch
from transformers import AutoTokenizer, T5EncoderModel

from opensora.registry import MODELS


class T5Embedder:
    def __init__(self, device, from_pretrained=None, *, torch_dtype=None, model_max_length=120):
        self.device = torch.device(device)
        self.model_max_length = model_max_length
        self.tokenizer = AutoTokenizer.from_pretrained(from_pretrained)
        self.model = T5EncoderModel.from_pretrained(from_pretrained, torch_dtype=torch_dtype).eval()

    def get_text_embeddings(self, texts):
        tokens = self.tokenizer(
            texts,
            max_length=self.model_max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=mask)["last_hidden_state"].detach(), mask


@MODELS.register_module("t5")
class T5Encoder:
    def __init__(
        self,
        from_pretrained=None,
        model_max_length=120,
        device="cuda",
        dtype=torch.float,
        cache_dir=None,
        shardformer=False,
        local_files_only=False,
    ):
        assert from_pretrained is not None, "Please specify the path to the T5 model"
        self.t5 = T5Embedder(device, from_pretrained, torch_dtype=dtype, model_max_length=model_max_length)
        self.t5.model.to(dtype=dtype)
        self.y_embedder = None
        self.model_max_length = model_max_length
        self.output_dim = self.t5.model.config.d_model
        self.dtype = dtype

    def encode(self, text):
        embeddings, mask = self.t5.get_text_embeddings(text)
        return dict(y=embeddings[:, None], mask=mask)

    def null(self, n):
        return self.y_embedder.y_embedding[None].repeat(n, 1, 1)[:, None]


def text_preprocessing(text, use_text_preprocessing: bool = True):
    return text.lower().strip()
