"""One `PeftModel` a task. They differ in the arguments that `forward` names, which trainers read to choose columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.config import TaskType
from lorakit.peft_model import PeftModel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None: a model need not know those that nobody passed."""
    return {name: value for name, value in arguments.items() if value is not None}


class _TextModel(PeftModel):
    """What models with one text as input share."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model; ids, masks and labels are (batch, tokens), labels of a whole text (batch,)."""
        named = _given(
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
        )
        return self.base_model(**named, **kwargs)


class PeftModelForCausalLM(_TextModel):
    """A decoder that continues text."""

    task_type: ClassVar[TaskType | None] = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder and a decoder that answer text with text."""

    task_type: ClassVar[TaskType | None] = TaskType.SEQ_2_SEQ_LM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model; ids, masks and labels are (batch, tokens)."""
        named = _given(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
        )
        return self.base_model(**named, **kwargs)


class PeftModelForSequenceClassification(_TextModel):
    """A model that labels a text. Its head ("classifier" or "score") is trained whole and saved."""

    task_type: ClassVar[TaskType | None] = TaskType.SEQ_CLS


class PeftModelForTokenClassification(_TextModel):
    """A model that labels each token. Its head ("classifier" or "score") is trained whole and saved."""

    task_type: ClassVar[TaskType | None] = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """A model that marks an answer in a text. Its head ("qa_outputs") is trained whole and saved."""

    task_type: ClassVar[TaskType | None] = TaskType.QUESTION_ANS

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model; ids and masks are (batch, tokens), positions (batch,)."""
        named = _given(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
        )
        return self.base_model(**named, **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """A model that gives embeddings."""

    task_type: ClassVar[TaskType | None] = TaskType.FEATURE_EXTRACTION

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model; ids and mask are (batch, tokens)."""
        named = _given(
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
        )
        return self.base_model(**named, **kwargs)
