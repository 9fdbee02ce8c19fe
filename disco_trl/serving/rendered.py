"""Texts that a chat template has already rendered, as RLHF engines send them to `/get_reward`."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.rendering import fit_to_template, render
from ..data.tokenization import tokenize


logger = logging.getLogger(__name__)

QUESTION, ANSWER = "TheQuestionStandsHere", "TheAnswerStandsHere"


class RenderedTexts:
    """Token ids of rendered texts, which are those of training and of `/score`.

    A text is taken for a rendered conversation if it contains the string with which the tokenizer's chat template asks
    for an answer. What follows that string is the answer, and the template renders it again. Many templates write an
    answer in another way than a policy continues its prompt: they put an empty block of reasoning before it, take
    reasoning out of it, trim it, or end it with a line break. The text of the prompt is taken as it is. It gets no
    special tokens beyond those that it contains, because the template has written the beginning-of-text token where
    there is one.

    Any other text is tokenized as plain text, as in training.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the reward model. Without a chat template every text is plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._ends = {token for token in (tokenizer.eos_token, tokenizer.pad_token) if token}
        self._has_warned = False
        self.start = self.begun = self.ending = ""
        if tokenizer.chat_template is None:
            return
        question = [{"role": "user", "content": QUESTION}]
        prompt = render(tokenizer, fit_to_template(tokenizer, question), add_generation_prompt=True)
        self.start = prompt.rpartition(QUESTION)[2]
        self.ending = self._answered(ANSWER).partition(ANSWER)[2]
        # Some templates begin the answer when they ask for it, with <think> for one. The template then renders the
        # answer with this beginning as the policy was to continue it.
        suffixes = (self.start[cut:] for cut in range(len(self.start), 0, -1))
        self.begun = next(filter(self._is_continued, suffixes), "")
        expected = tokenize(tokenizer, [*question, {"role": "assistant", "content": self.begun + ANSWER}])
        if not self.start or self(prompt + ANSWER + (tokenizer.eos_token or "")) != expected:
            logger.warning(
                "the chat template does not show where an answer begins, so that the rewards of /get_reward are not "
                "those of /score, which renders conversations as in training; send the messages to /score instead"
            )

    def __call__(self, text: str, prompt: Any = None) -> list[int]:
        """Tokenizes one text.

        Args:
            text (`str`):
                Rendered conversation or plain text. Padding and end-of-text tokens at its end are removed.
            prompt (`str`, *optional*, defaults to `None`):
                Beginning of the text up to its answer. Without it, the answer is what follows the last request for
                one, so that an answer that contains such a request is cut there.

        Returns:
            `list[int]`: Token ids.
        """
        # Where padding and end of text are one token, as in many chat models, the first is the end and the others pad.
        text = self._without_ends(text)
        asked = prompt if isinstance(prompt, str) and text.startswith(prompt) and self.start in prompt else text
        if not self.start or self.start not in asked:
            # The tokenizer adds the beginning-of-text token itself; one in the text would be a second.
            return tokenize(self.tokenizer, text.removeprefix(self.tokenizer.bos_token) if self._adds_bos else text)
        before = text[: asked.rindex(self.start)]
        answer = text[len(before) + len(self.start) :]
        # The longer ending first, so that what is removed is all of the ending that the answer has.
        for mark in (self.ending, self.ending.rstrip()):
            if mark and answer.endswith(mark):
                answer = self._without_ends(answer.removesuffix(mark))
                break
        try:
            rendered = before + self._answered(self.begun + answer)
        except Exception as error:  # GPT-OSS's template, for one, refuses its own marks of reasoning in an answer
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    f"/get_reward: the chat template refuses an answer ({error}), which is scored as it is written; "
                    "have the engine send the answer without its reasoning. No further one is named"
                )
            rendered = before + self.start + answer + self.ending
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _answered(self, answer: str) -> str:
        """What the template writes after a question that is answered."""
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
        return render(self.tokenizer, fit_to_template(self.tokenizer, messages)).partition(QUESTION)[2]

    def _is_continued(self, begun: str) -> bool:
        """Whether the template writes an answer that begins with this text as if it had followed the prompt."""
        try:
            return self._answered(begun + ANSWER).startswith(self.start + ANSWER)
        except Exception:  # a template may refuse its own marks in an answer
            return False

    def _without_ends(self, text: str) -> str:
        while end := next((token for token in self._ends if text.endswith(token)), None):
            text = text.removesuffix(end)
        return text
