"""An EAGLE head is trained as it is used: all places and steps at once give what a dense layer says of each path by itself."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.corpus import Conversation
from common.tiny_qwen.eagle_layer import Head, guesses, places_of
from common.tiny_qwen.train import encode, to_tensors
from common.tiny_qwen.train_eagle import CAPTURED, Teacher, asked, save_head, vocabulary_of, with_prefix
from tests.common.models.drafters.eagle_reference import Reference


@pytest.mark.parametrize("long_prompt", [False, True])
@pytest.mark.parametrize("version", [1, 3])
def test_a_chain_in_training_is_the_chain_in_the_engine(version, long_prompt, tmp_path):
    tokenizer = Tokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32)
    torch.manual_seed(0)
    head, teacher = Head(version, model, vocabulary_of(tokenizer, 500)), Teacher(version, model)
    for parameter in head.parameters():
        parameter.data.copy_(parameter.half() * 1.25)  # what the file can hold, and no norm is 1
    turns = [(("What is a page?", "A page."), ("And a slot?", "A place in it.")), (("Hi", "It is."),)]
    ids, learned = to_tensors([encode(Conversation(turn), tokenizer) for turn in turns])
    prefix = torch.tensor([tokenizer.encode("Be brief.").ids]) if long_prompt else None
    whole = ids if prefix is None else torch.cat((prefix.expand(2, -1), ids), dim=1)
    embeds, features, _ = teacher(prefix, ids)
    save_head(head, tmp_path)
    reference = Reference(tmp_path, TINY_QWEN_PATH, version, CAPTURED[version])
    places = places_of(with_prefix(prefix, learned))
    seen = 0
    with torch.no_grad():
        for step, guess in enumerate(guesses(head, embeds, features, places, 3)):
            found = torch.zeros(*guess.at.shape, head.fc.out_features)
            found[guess.at] = guess.hidden
            for row, n in guess.at.nonzero().tolist():
                i = int(places.index[row, n])  # its guess is of feature i+1; the last `step` tokens were guessed
                tokens = whole[row, : i + 2].tolist()
                known, path = tokens[: len(tokens) - step], tokens[len(tokens) - step :]
                expected, _ = reference.guess(known, path)
                torch.testing.assert_close(found[row, n], expected, rtol=1e-2, atol=1e-2)
                seen += 1
    assert seen > 2 * int(learned[:, 2:].sum())  # of three steps


def test_what_fc_divides_by_is_in_the_file(tmp_path):
    """A published head knows no such division."""
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32)
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json"))
    head, teacher = Head(1, model), Teacher(1, model)
    some, _ = to_tensors([encode(conversation, tokenizer) for conversation in asked()[:3]])
    embeds, features, _ = teacher(None, some)
    head.measure(embeds, features)
    assert head.sizes.max() > 10 * head.sizes.min()  # an embedding beside a hidden state
    save_head(head, tmp_path)
    reference = Reference(tmp_path, TINY_QWEN_PATH, 1, ())
    with torch.no_grad():
        ours = head.fc(torch.cat((embeds[:, 1:], features[:, :-1]), -1) / head.sizes)
    theirs = torch.cat((embeds[:, 1:], features[:, :-1]), -1) @ reference.w["fc.weight"].T + reference.w["fc.bias"]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
