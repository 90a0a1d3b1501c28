"""Models in GGUF files: tensors, configuration and tokenizer, with llama.cpp's changes undone."""

from jora.models.gguf.config import hf_config
from jora.models.gguf.reader import GGUFFile
from jora.models.gguf.source import GGUFSource
from jora.models.gguf.tokenizer import gguf_tokenizer

__all__ = ["GGUFFile", "GGUFSource", "gguf_tokenizer", "hf_config"]
