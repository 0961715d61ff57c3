"""The tokenizer of the demo's tests."""

import pytest
from transformers import PreTrainedTokenizerFast

from fastalign.demo.sentences import CHAT_TEMPLATE
from fastalign.stages.tokenizer import train_tokenizer
from tests.demo.sentences import SENTENCES


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([sentence.text for sentence in SENTENCES], 400, chat_template=CHAT_TEMPLATE)
