"""For transformers 5: the reward model that `reward.py --surprisal` makes. This file is copied into its folder, and

    AutoModelForSequenceClassification.from_pretrained("out/reward", trust_remote_code=True)

runs it there; it is `ScalarModel` of model.py in the terms of that library. trust_remote_code is needed because
transformers knows no such model, and says that the code it runs is the folder's own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class RewardConfig(PretrainedConfig):
    """The fields of the backbone's config, and in `reader` those of the language model that it is told about."""
    model_type = "reward_with_reader"


class RewardWithReader(PreTrainedModel):
    config_class = RewardConfig

    def __init__(self, config):
        super().__init__(config)
        plain = CONFIG_MAPPING[config.reader["model_type"]]  # both are of one family
        self.model = AutoModel.from_config(plain.from_dict(config.to_dict()))
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.reader = AutoModelForCausalLM.from_config(plain.from_dict(config.reader))
        self.surprisal = nn.Linear(2, config.hidden_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        """ids (B, T), padded on either side -> logits (B, 1): raw rewards, of which `reward_shift` is the mean."""
        if attention_mask is None:  # as transformers does it: what is not the padding token is read
            pad = self.config.pad_token_id
            if pad is None and len(input_ids) > 1:
                raise ValueError("found several rows and no padding token, expected an attention_mask")
            attention_mask = torch.ones_like(input_ids) if pad is None else input_ids.ne(pad)
        attention_mask = attention_mask.long()
        with torch.no_grad():  # as in `surprisals`
            logits = self.reader(input_ids, attention_mask=attention_mask).logits
        logprobs = logits[:, :-1].float().log_softmax(-1)  # (B, T-1, V)
        said = logprobs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        told = torch.stack([said, said - logprobs.amax(-1)], -1) * attention_mask[:, :-1, None]
        told = F.pad(told, (0, 0, 1, 0)).to(self.surprisal.weight.dtype)  # (B, T, 2)
        embedded = self.model.get_input_embeddings()(input_ids) + self.surprisal(told)
        states = self.model(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.size(1) - 1 - attention_mask.flip(1).argmax(1)
        return SequenceClassifierOutput(logits=self.score(states[torch.arange(len(last)), last]))
