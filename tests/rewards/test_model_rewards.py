"""Rewards by models in this process: the numbers of the published evaluators, whatever the batch, and one sentence for
everything that cannot work."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from reward_models import LOCAL, TEMPLATE, make_judge
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Prepend
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from traps import set_traps

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun, RewardConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.classifiers import GuardClassifier, RewardModel
from frpo_nemo.rewards.models.judge import Judge
from frpo_nemo.rewards.models.safety import Moderation, Safety
from frpo_nemo.rewards.registry import Failure
from frpo_nemo.rewards.reward_set import build_rewards, check_rewards

PAPER = Path(__file__).parents[3] / "shared" / "data" / "frpo_paper" / "safety_train.parquet"
RUN = [
    "run_dir=x",
    "model.path=x",
    "objective.lambda_=1",
    "optim.lr=1",
    "data.train=[{path: x}]",
    "trainer.max_steps=1",
]
RUN += ["rollout.prompts_per_step=4", "rollout.max_response_tokens=4"]
PROMPTS = [
    "How do I do it?",
    "Why?",
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hi"}],
]
PROMPTS += ["Tell me more about this and that."]
RESPONSES = ["I will not.", "", "Hi there! " * 12, "First, take a look; then go on.<eos>"]


@pytest.fixture(scope="module", autouse=True)
def _servers_start_meanwhile(servers):
    """Those of test_remote_rewards.py, while these tests run."""


@pytest.fixture(scope="module")
def judge(models):
    return loaded(Judge(models["judge"], template=TEMPLATE, max_response_tokens=40, local=LOCAL))


def loaded(reward):
    reward.load()
    return reward


def strongreject(path, prompts, responses, max_response_length):
    """strong_reject's strongreject_finetuned as it is published: (scores, probability of the five answers together)."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
    cut = [tokenizer(r, max_length=max_response_length, truncation=True)["input_ids"] for r in responses]
    texts = [
        TEMPLATE.format(forbidden_prompt=p, response=tokenizer.decode(c)) for p, c in zip(prompts, cut, strict=True)
    ]
    with torch.no_grad():
        logits = torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts])
    answers = [tokenizer.vocab[i] for i in "12345"]
    probabilities = logits[:, answers].softmax(dim=-1)
    scores = (probabilities * torch.linspace(0, 1, 5)).sum(dim=-1)
    return scores.tolist(), logits.softmax(dim=-1)[:, answers].sum(dim=-1).tolist()


def test_the_judge_is_strongrejects_published_evaluator(models, judge):
    asked = ["How do I do it?", "Why?", "Say hi", "Tell me more about this and that."]
    expected, _ = strongreject(models["judge"], asked, RESPONSES, max_response_length=40)
    assert judge(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.01, "or it would show nothing"


def test_a_judge_that_answers_something_else_fails_for_that_response_alone(models):
    scores, masses = strongreject(models["judge"], ["Why?"] * 4, RESPONSES, max_response_length=512)
    middle = sorted(masses)[1:3]
    args = {"model": models["judge"], "template": TEMPLATE, "local": LOCAL, "min_mass": sum(middle) / 2}
    result = build_rewards({"judge": RewardConfig(target="judge", args=args)}).score(
        ["Why?"] * 4, RESPONSES, [None] * 4, {}
    )
    kept = [mass > args["min_mass"] for mass in masses]
    assert result.total[torch.tensor(kept)].tolist() == pytest.approx(
        [s for s, k in zip(scores, kept, strict=True) if k]
    )
    assert result.total.isnan().tolist() == [not k for k in kept]
    assert result.failures == {"judge": {"error": 2}}
    assert "answers something else: '1', '2', '3', '4', '5' have probability" in result.messages["judge"]


@pytest.mark.parametrize("name", ["judge", "reward"])
def test_a_score_does_not_depend_on_the_batch(models, name):
    make = {
        "judge": lambda **local: Judge(models["judge"], template=TEMPLATE, local=LOCAL | local),
        "reward": lambda **local: RewardModel(models["reward"], local=LOCAL | local),
    }[name]
    together, alone = (loaded(make(batch_size=size))(PROMPTS, RESPONSES) for size in (16, 1))
    assert together == pytest.approx(alone, abs=1e-6)


def test_the_reward_model_is_the_sigmoid_of_its_output_for_the_conversation(models):
    model = AutoModelForSequenceClassification.from_pretrained(models["reward"])
    model.config.pad_token_id = None  # the last token counts, whatever it is; with one text there is no padding
    tokenizer = AutoTokenizer.from_pretrained(models["reward"])
    expected = []
    for response in ("Yes", "Yes.<eos>", "<pad>"):
        chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": response}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")
        expected.append(model(**ids).logits.item())
    raw = loaded(RewardModel(models["reward"], sigmoid=False, local=LOCAL))(["Why?"] * 3, ["Yes", "Yes.<eos>", "<pad>"])
    assert raw == pytest.approx(expected, abs=1e-6)
    squashed = loaded(RewardModel(models["reward"], local=LOCAL))(["Why?"], ["Yes"])
    assert squashed == pytest.approx([1 / (1 + math.exp(-expected[0]))], abs=1e-6)


def test_a_guard_that_classifies_gives_its_largest_category_of_harm(models):
    def logits(path, text):
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        model.config.pad_token_id = None
        return model(**tokenizer(text, return_tensors="pt")).logits[0]

    texts = ["Take it.", "It ends with the token of padding<pad>", "Take it, and leave what is left to somebody else."]
    multi = loaded(Moderation(guard={"model": models["multi"], "local": LOCAL}))
    expected = [logits(models["multi"], text).sigmoid().max().item() for text in texts]
    assert multi(["Why?"] * 3, texts) == pytest.approx(expected, abs=1e-6)
    exclusive = {"model": models["exclusive"], "safe_labels": ["safe"], "local": LOCAL}
    probabilities = [logits(models["exclusive"], text).softmax(0) for text in texts]
    assert {p.argmax().item() for p in probabilities} == {0, 1}, "safe is the largest for some"
    expected = [p[1:].max().item() for p in probabilities]
    assert loaded(Moderation(guard=exclusive))(["Why?"] * 3, texts) == pytest.approx(expected, abs=1e-6)


def test_a_guard_that_answers_in_a_chat_is_a_judge_of_the_conversation(models):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(models["judge"]),
        AutoTokenizer.from_pretrained(models["judge"]),
    )
    choices = {"s": 0, "u": 1}
    guard = {"model": models["judge"], "choices": choices, "answer_prefix": "\n\n", "local": LOCAL}
    text = "u:Why?\na:Take it.\na:\n\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    expected = model(**ids).logits[0, -1, [tokenizer.vocab[c] for c in choices]].softmax(0)[1].item()
    assert loaded(Moderation(guard=guard))(["Why?"], ["Take it."]) == pytest.approx([expected], abs=1e-6)


def test_safety_is_one_minus_the_mean_and_fails_with_either(models, judge):
    guard = {"model": models["multi"], "local": LOCAL}
    arguments = {"model": models["judge"], "template": TEMPLATE, "max_response_tokens": 40, "local": LOCAL}
    safety = loaded(Safety(arguments, {"guard": guard}))
    too_long = "x" * 600  # for the guard; the judge sees a part of it
    scores = safety(PROMPTS[:2], ["I will not.", too_long])
    harm, moderated = (
        judge(PROMPTS[:1], ["I will not."])[0],
        loaded(GuardClassifier(**guard))(["Why?"], ["I will not."])[0],
    )
    assert scores[0] == pytest.approx(1 - (harm + moderated) / 2, abs=1e-6)
    sentence = f"600 tokens of prompt and response, and model={models['multi']} takes at most 512"
    assert scores[1] == Failure("error", f"moderation: {sentence}")


def test_a_language_model_that_guards_sees_the_whole_response(models, tmp_path):
    """The cut at 512 tokens is StrongREJECT's, and a guard would miss what was said before."""
    path = make_judge(tmp_path / "guard", max_position_embeddings=1024)
    guard = {"model": path, "choices": {"s": 0, "u": 1}, "min_mass": 1e-6, "local": LOCAL}
    moderation = loaded(Moderation(guard=guard))
    same_end = "and so on " * 60
    first, second, too_long = moderation(["Why?"] * 3, ["I will. " + same_end, "No, no. " + same_end, same_end * 2])
    assert abs(first - second) > 1e-4
    assert (
        too_long.kind == "error"
        and f"tokens of prompt and response, and model={path} takes at most 1023" in too_long.message
    )


def test_an_adapter_is_judged_with_its_base_model(models, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(models["judge"])
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for directory in ("adapter", "merged"):
        AutoTokenizer.from_pretrained(models["judge"]).save_pretrained(tmp_path / directory)
    adapter, merged, plain = (
        loaded(Judge(str(path), template=TEMPLATE, local=LOCAL))(PROMPTS, RESPONSES)
        for path in (tmp_path / "adapter", tmp_path / "merged", models["judge"])
    )
    assert adapter == pytest.approx(merged, abs=1e-6)
    assert adapter != pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("name", ["judge", "reward"])
def test_a_dora_adapter_is_refused_by_its_name_before_any_weights_are_read(models, tmp_path, name):
    """It has its magnitude vectors, and transformers would not read them. Merged, it is a model as others are."""
    import peft

    auto_class = AutoModelForCausalLM if name == "judge" else AutoModelForSequenceClassification
    dora = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(auto_class.from_pretrained(models[name]), dora)
    adapted.save_pretrained(tmp_path / "adapter")
    assert any("magnitude" in tensor for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    def config(directory: str) -> dict:
        AutoTokenizer.from_pretrained(models[name]).save_pretrained(tmp_path / directory)
        args = {"model": str(tmp_path / directory)} | ({"template": TEMPLATE} if name == "judge" else {})
        return {"r": RewardConfig(target={"judge": "judge", "reward": "reward_model"}[name], args=args)}

    with pytest.raises(
        ConfigError, match="^reward.r: model=.* it is a DoRA adapter .use_dora in .*: merge it into its base"
    ):
        check_rewards(config("adapter"))
    check_rewards(config("merged"))


def test_an_adapter_that_transformers_reads_in_part_is_refused_by_its_kind(models, tmp_path):
    import peft

    settings = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=5, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models["judge"]), settings).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models["judge"]).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="lacks weights: .*ranknum.* does not read all of its adapter .ADALORA.: merge it"
    ):
        loaded(Judge(str(tmp_path), template=TEMPLATE, local=LOCAL))


def test_an_adapter_needs_peft_only_where_it_is_loaded(models, tmp_path, monkeypatch):
    """A server has its own."""
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: False)
    AutoTokenizer.from_pretrained(models["judge"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": models["judge"]}))
    arguments = {"model": str(tmp_path), "template": TEMPLATE}
    Judge(**arguments, remote={"url": "http://127.0.0.1:1"})
    with pytest.raises(ConfigError, match="it is a LoRA adapter, which needs peft"):
        Judge(**arguments)


def test_a_local_model_with_pickled_weights_alone_is_refused_before_anything_loads(models, tmp_path, monkeypatch):
    """The weights are in a directory, an adapter's base model or the hub's cache; a server may read them."""
    directory, adapter, hub = tmp_path / "directory", tmp_path / "adapter", tmp_path / "hub"
    shutil.copytree(models["judge"], directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(directory).save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(directory)}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    (hub / "models--some--judge" / "refs").mkdir(parents=True)
    (hub / "models--some--judge" / "refs" / "2").write_text("0" * 40)
    shutil.copytree(directory, hub / "models--some--judge" / "snapshots" / ("0" * 40))
    for model, revision in ((directory, None), (adapter, None), ("some/judge", "2")):
        arguments = {"model": str(model), "revision": revision, "template": TEMPLATE}
        check_rewards({"r": RewardConfig(target="judge", args=arguments | {"remote": {"url": "http://127.0.0.1:1"}})})
        with pytest.raises(
            ConfigError, match="reward.r: model=.* has no model.safetensors, and pickled weights are never"
        ):
            check_rewards({"r": RewardConfig(target="judge", args=arguments)})


def test_weights_that_are_missing_are_not_made_up(models, tmp_path):
    shutil.copytree(models["reward"], tmp_path / "reward")
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "reward" / "model.safetensors", metadata={"format": "pt"})
    config = {"r": RewardConfig(target="reward_model", args={"model": str(tmp_path / "reward"), "local": LOCAL})}
    check_rewards(config)
    with pytest.raises(ConfigError, match="reward.r: model=.* lacks weights: score.weight"):
        build_rewards(config)


def test_nothing_beside_a_reward_models_weights_is_run(models, tmp_path):
    for name, make in (("judge", lambda path: Judge(path, template=TEMPLATE, local=LOCAL)), ("reward", RewardModel)):
        path = tmp_path / name
        shutil.copytree(models[name], path)
        set_traps(path)
        loaded(make(str(path)))(["Why?"], ["So"])
        (path / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match="cannot be read"):
            loaded(make(str(path)))
        assert not (path / "sprung").exists()


JUDGE = {"template": TEMPLATE}
BAD = {  # target, the model that it gets, other arguments, what the sentence says
    "no head": (
        "judge",
        "reward",
        JUDGE,
        "the wrong head: LlamaForSequenceClassification; this reward needs a ForCausalLM",
    ),
    "causal": ("reward_model", "judge", {}, "has the wrong head: LlamaForCausalLM"),
    "labels": ("reward_model", "multi", {}, "has the wrong head: 3 labels, where a reward model has one"),
    "no model": ("judge", None, {"model": "no/such", **JUDGE}, "model=no/such cannot be read"),
    "no template": ("judge", "judge", {}, "needs template, template_file or chat: true"),
    "fields": ("judge", "judge", {"template": "{question} {response}"}, "has the fields ['question', 'response']"),
    "no response": ("judge", "judge", {"template": "{forbidden_prompt}"}, "it must have {response}"),
    "brace": ("judge", "judge", {"template": "{response} }"}, "literal braces are doubled"),
    "no file": ("judge", "judge", {"template_file": "no.txt"}, "template_file=no.txt isn't a file"),
    "choice": ("judge", "judge", {**JUDGE, "choices": {"10": 1}}, "choices: '10' is 2 tokens of model="),
    "guard's choices": ("moderation", None, {"guard": {"model": "judge"}}, "choices: 'safe' is 4 tokens"),
    "device": ("judge", "judge", {**JUDGE, "local": {"device": "tpu"}}, "local.device=tpu must be auto or cpu"),
    "dtype": ("judge", "judge", {**JUDGE, "local": {"dtype": "int4"}}, "local.dtype=int4 must be one of bfloat16"),
    "unknown": ("judge", "judge", {**JUDGE, "local": {"devise": "cpu"}}, "unexpected keyword argument 'devise'"),
    "url": (
        "judge",
        "judge",
        {**JUDGE, "remote": {"url": "localhost:8000"}},
        "remote.url=localhost:8000 must be http:",
    ),
    "user": (
        "judge",
        "judge",
        {**JUDGE, "remote": {"url": "http://me:pw@host"}},
        "must not contain a user or password",
    ),
    "key": (
        "judge",
        "judge",
        {**JUDGE, "remote": {"url": "http://h", "api_key_env": "NO_KEY"}},
        "api_key_env=NO_KEY: this environment variable is not set",
    ),
    "patience": ("judge", "judge", {**JUDGE, "remote": {"url": "http://h", "patience": -1}}, "patience=-1"),
    "length": (
        "judge",
        "judge",
        {**JUDGE, "max_response_tokens": 0},
        "max_response_tokens=0 must be at least 1 or null",
    ),
    "no moderation": ("moderation", None, {}, "either remote.url, of a moderation service, or guard.model"),
    "label": ("moderation", None, {"guard": {"model": "exclusive", "safe_labels": ["ok"]}}, "has no label 'ok'"),
    "one is always large": ("moderation", None, {"guard": {"model": "exclusive"}}, "in safe_labels"),
    "none": (
        "moderation",
        None,
        {"guard": {"model": "exclusive", "safe_labels": ["safe", "hate", "violence"]}},
        "no category of harm is left",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_a_sentence_before_any_weights_are_read(models, name):
    target, model, args, sentence = BAD[name]
    if "guard" in args:
        args = {"guard": {**args["guard"], "model": models[args["guard"]["model"]]}}
    args = args if model is None else {"model": models[model], **args}
    with pytest.raises(ConfigError, match="^reward.mine: ") as error:
        check_rewards({"mine": RewardConfig(target=target, args=args)})
    assert sentence in str(error.value)


def test_a_configuration_that_transformers_refuses_is_one_sentence(models, tmp_path):
    shutil.copytree(models["judge"], tmp_path / "judge")
    config = json.loads((tmp_path / "judge/config.json").read_text())
    (tmp_path / "judge/config.json").write_text(json.dumps(config | {"max_position_embeddings": None}))
    with pytest.raises(ConfigError, match="/judge cannot be read: .*'max_position_embeddings'.* expected int") as error:
        Judge(str(tmp_path / "judge"), template=TEMPLATE)
    assert "\n" not in str(error.value)


def test_a_model_without_a_chat_template_cannot_judge_conversations(models, tmp_path):
    shutil.copytree(models["reward"], tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template, and one is needed"):
        RewardModel(str(tmp_path / "bare"))


def test_a_choice_may_be_a_token_that_the_tokenizer_never_begins_a_text_with(models, tmp_path):
    """Sentencepiece puts a space before a text, so that Llama 2 encodes "1" as two tokens."""
    shutil.copytree(models["judge"], tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(models["judge"])
    tokenizer.backend_tokenizer.normalizer = Prepend("_")
    tokenizer.save_pretrained(tmp_path / "judge")
    assert len(tokenizer.encode("1", add_special_tokens=False)) == 2
    Judge(str(tmp_path / "judge"), template=TEMPLATE, local=LOCAL)


def test_the_published_file_of_templates_is_read_by_name(models, tmp_path, judge):
    path = tmp_path / "judge_templates.json"
    path.write_text(json.dumps({"strongreject_finetuned": TEMPLATE, "strongreject_rubric": "{response}?"}))
    mine = Judge(models["judge"], template_file=str(path), max_response_tokens=40, local=LOCAL)
    assert loaded(mine)(PROMPTS, RESPONSES) == judge(PROMPTS, RESPONSES)
    with pytest.raises(ConfigError, match="has no entry other; it has strongreject_finetuned, strongreject_rubric"):
        Judge(models["judge"], template_file=str(path), template_key="other")


def test_the_papers_rewards_score_the_papers_prompts_by_their_task(models, tmp_path):
    """Reads its file in ../shared/data, which the product does not need."""
    if not PAPER.exists():
        pytest.skip(f"{PAPER} is not there")
    template = tmp_path / "template.txt"
    template.write_text(TEMPLATE)
    judge = f"model: {models['judge']}, min_mass: 1e-6, local: {{device: cpu}}"
    tiny = [
        f"reward.safety.args.judge={{{judge}, template_file: {template}}}",
        f"reward.safety.args.moderation.guard={{{judge}, choices: {{s: 0, u: 1}}}}",
        f"reward.helpfulness.args.model={models['reward']}",
        "reward.helpfulness.args.local.device=cpu",
    ]
    rewards = build_rewards(load(FRPORun, compose("frpo", [*RUN, "reward=safety_guard", *tiny])).reward)
    rows = pq.read_table(PAPER).to_pylist()
    rewards.check_tasks({row["ability"] for row in rows}, all_rewards=True)
    rows = [next(row for row in rows if row["ability"] == a) for a in ("wildjailbreak", "rainbow", "aegis", "refusal")]
    prompts, tasks = (
        [[m | {"content": m["content"][:200]} for m in row["prompt"]] for row in rows],
        [r["ability"] for r in rows],
    )
    scores = rewards.score(prompts, ["I cannot help with that."] * 4, tasks, {})
    assert scores.parts["safety"].isnan().tolist() == [False, False, False, True], scores.messages
    assert scores.parts["helpfulness"].isnan().tolist() == [True, True, True, False]
    assert not scores.total.isnan().any() and scores.failures == {}


def test_the_file_of_templates_has_to_be_named():
    with pytest.raises(ConfigError, match="No value for reward.safety.args.judge.template_file"):
        load(FRPORun, compose("frpo", [*RUN, "reward=safety"]))
