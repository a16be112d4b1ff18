"""Tokenizers from a SentencePiece model alone, with exactly the ids that SentencePiece itself gives.

transformers loads a folder that has a `tokenizer.model` and no `tokenizer.json` as a generic tokenizer, whose ids
differ: the space that SentencePiece puts before every text is missing, or is left out before a text that begins with
one. Names of special tokens are found in a text, as by every tokenizer of transformers; SentencePiece does not do that.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

BPE, NORMAL, CONTROL, USER_DEFINED = 2, 1, 3, 4
"""Numbers of SentencePiece's own format: a model type, and types of pieces."""


def wrap_sentencepiece(
    model_proto: bytes, add_bos_token: bool = True, add_eos_token: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """A transformers tokenizer that adds the begin token (where the model has one) to the ids of a serialized model.

    Byte-pair models that change nothing of a text, as those of Llama, Mistral and Gemma are, become fast tokenizers
    that save as a tokenizer.json. All others run SentencePiece itself, because the fast ones differ from it where
    texts are normalized. options: of the tokenizer, such as pad_token or chat_template.
    """
    proto = import_protobuf().ModelProto.FromString(model_proto)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    names = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    specials = {f"{name}_token": proto.pieces[number].piece for name, number in names.items() if number >= 0}
    options = specials | {name: value for name, value in options.items() if value is not None}
    begin = [str(options["bos_token"])] if add_bos_token and "bos_token" in options else []
    end = [str(options["eos_token"])] if add_eos_token and "eos_token" in options else []
    changes_text = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    if trainer.model_type == BPE and normalizer.escape_whitespaces and not changes_text:
        backend = _fast_backend(proto)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
        single, pair = [*begin, "$A", *end], [f"{part}:1" for part in (*begin, "$B", *end)]
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*begin, *end}]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(single), pair=" ".join([*single, *pair]), special_tokens=ids
        )
        return tokenizer
    return _exact(model_proto, begin, end, options)


class SentencePieceTokenizer(SentencePieceBackend):
    """SentencePiece itself behind transformers' interface: exact for every model, without offsets into the text."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return str(self.sp_model.decode_pieces(tokens))

    def save_pretrained(self, save_directory: Any, **options: Any) -> tuple[str, ...]:
        """tokenizer.model and what was said of it, without the name of this class, which transformers does not know."""
        files: tuple[str, ...] = super().save_pretrained(save_directory, **options)
        path = Path(save_directory, "tokenizer_config.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("tokenizer_class", "backend", "sp_model_kwargs", "added_tokens_decoder"):
            content.pop(name, None)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return files


def _exact(model_proto: bytes, begin: list[str], end: list[str], options: dict[str, Any]) -> PreTrainedTokenizerBase:
    patterns = {(False, False): "none", (True, False): "bos", (False, True): "eos", (True, True): "bos_eos"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.model")
        path.write_bytes(model_proto)
        return SentencePieceTokenizer(
            vocab_file=str(path),
            special_tokens_pattern=patterns[bool(begin), bool(end)],
            token_type_ids_pattern="all_zeros",
            model_input_names=["input_ids", "attention_mask"],
            **options,
        )


def _fast_backend(proto: Any) -> Tokenizer:
    """The same merges in the same order; SentencePiece puts its space before every text, even one that begins so."""
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece in proto.pieces:
        if piece.type != NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in normal and right in normal:
                merges.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    prefix = [normalizers.Prepend("▁")] if proto.normalizer_spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    return backend
