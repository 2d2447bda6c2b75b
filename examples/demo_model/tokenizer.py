"""The demo models' tokenizer: a byte-level BPE learned from the training split, with a chat template in the manner of ChatML.

Invariants: any UTF-8 text round-trips; a digit is always a token of its own, so that a sum can be learned column by column;
the same texts give the same tokenizer. A document, chat or plain, is `<|bos|> ... <|im_end|>`: one token ends an assistant's
turn and a plain text alike, so a server needs to know one end of sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from examples.demo_model.corpus import Document, Message

PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, START, END)
PAD_ID, BOS_ID, START_ID, END_ID = range(len(SPECIAL_TOKENS))
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learn at most `vocab_size` entries from `texts`; `max_length` (tokens) is what the tokenizer says that its model holds.

    Raises:
        ValueError: `vocab_size` is below the bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"Got {vocab_size = } but expected at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,  # bytes are never unknown, but some classes add a token of their own where this is unset
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def plain(document: Document) -> str:
    """A document's words without special tokens, roles included: what the tokenizer learns from."""
    if not document.messages:
        return document.text
    return "\n".join(f"{message.role}\n{message.content}" for message in document.messages)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[list[int]]:
    """Token ids of each document, from `<|bos|>` to the end token, chats through the very template that is served."""
    texts = [document.text for document in documents]
    chats = [at for at, document in enumerate(documents) if document.messages]
    if chats:
        rendered = tokenizer.apply_chat_template([as_chat(documents[at].messages) for at in chats], tokenize=False)
        for at, text in zip(chats, rendered, strict=True):
            texts[at] = text.removeprefix(BOS).removesuffix(END + "\n")  # both come back as ids below
    ids = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=True)
    return [[*item.ids, END_ID] for item in ids]


def as_chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as `apply_chat_template` and the HTTP API take them."""
    return [{"role": message.role, "content": message.content} for message in messages]
