import torch
from transformers import AutoTokenizer, T5EncoderModel

from opensora.registry import MODELS


class T5Embedder:
    available_models = ["DeepFloyd/t5-v1_1-xxl"]

    def __init__(
        self,
        device,
        from_pretrained=None,
        *,
        cache_dir=None,
        hf_token=None,
        use_text_preprocessing=True,
        t5_model_kwargs=None,
        torch_dtype=None,
        use_offload_folder=None,
        model_max_length=120,
        local_files_only=False,
    ):
        assert from_pretrained in self.available_models
        self.device = torch.device(device)
        self.use_text_preprocessing = use_text_preprocessing
        self.hf_token = hf_token
        self.model_max_length = model_max_length
        source = dict(cache_dir=cache_dir, local_files_only=local_files_only)
        if t5_model_kwargs is None:
            t5_model_kwargs = dict(low_cpu_mem_usage=True, torch_dtype=torch_dtype or torch.bfloat16)
            t5_model_kwargs["device_map"] = {"shared": self.device, "encoder": self.device}
        self.tokenizer = AutoTokenizer.from_pretrained(from_pretrained, **source)
        self.model = T5EncoderModel.from_pretrained(from_pretrained, **source, **t5_model_kwargs).eval()

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
        self.t5 = T5Embedder(
            device,
            from_pretrained,
            torch_dtype=dtype,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            model_max_length=model_max_length,
        )
        self.t5.model.to(dtype=dtype)
        self.y_embedder = None
        self.model_max_length = model_max_length
        self.output_dim = self.t5.model.config.d_model
        self.dtype = dtype
        if shardformer:
            raise NotImplementedError("colossalai's layers")

    def encode(self, text):
        embeddings, mask = self.t5.get_text_embeddings(text)
        return dict(y=embeddings[:, None], mask=mask)

    def null(self, n):
        return self.y_embedder.y_embedding[None].repeat(n, 1, 1)[:, None]


def text_preprocessing(text, use_text_preprocessing: bool = True):
    return text.lower().strip()
