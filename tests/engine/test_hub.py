"""What goes to the Hugging Face hub, with a stand-in for the hub that keeps it in a folder."""

import shutil
from types import SimpleNamespace

import pytest
from encoder_reference import small_config
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoModelForSequenceClassification

from engine.errors import UserError
from engine.export.export import export_model
from engine.export.hub import push_to_hub
from engine.student import FFNASForSequenceClassification


class Hub:
    """The calls of `huggingface_hub.HfApi` that are used; repositories are folders."""

    def __init__(self, place):
        self.place, self.private, self.broken = place, {}, None

    def __call__(self, **_):
        return self

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert (repo_type, exist_ok) == ("model", True)
        if self.broken is not None:
            raise self.broken
        self.private.setdefault(repo_id, bool(private))
        return f"https://hub.example/{repo_id}"

    def repo_info(self, repo_id, *, repo_type):
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, *, repo_id, folder_path, repo_type, commit_message):
        assert commit_message
        shutil.copytree(folder_path, self.place / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_made_up")
    return made


@pytest.fixture
def model(tmp_path):
    """A model directory as a search leaves it behind."""
    config = small_config(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    export_model(FFNASForSequenceClassification(config), None, tmp_path / "model", None, {"name": "n"}, drawing=b"png")
    return tmp_path / "model"


def test_all_files_go_up_as_they_are(hub, model):
    assert push_to_hub(model, "ann/small") == "https://hub.example/ann/small"
    there = hub.place / "ann" / "small"
    names = sorted(path.name for path in model.iterdir())
    assert {"README.md", "architecture.png", "config.json", "model.safetensors", "modeling_ffnas.py"} <= set(names)
    assert sorted(path.name for path in there.iterdir()) == names
    assert all((there / name).read_bytes() == (model / name).read_bytes() for name in names)
    assert hub.private == {"ann/small": False}
    loaded = AutoModelForSequenceClassification.from_pretrained(there, trust_remote_code=True)
    assert loaded.config.id2label == {0: "neg", 1: "pos"}


def test_private_is_private(hub, model):
    push_to_hub(model, "ann/small", private=True)
    assert hub.private == {"ann/small": True}
    hub.private["ann/open"] = False
    with pytest.raises(UserError, match="ann/open is there already and everybody can read it"):
        push_to_hub(model, "ann/open", private=True)
    assert not (hub.place / "ann" / "open").exists()


@pytest.mark.parametrize("name", ["small", "ann/", "/small", "a/b/c", "ann/sm all", "https://hub.example/ann/small"])
def test_names_that_are_none_are_refused(hub, model, name):
    with pytest.raises(UserError, match="no name on the hub"):
        push_to_hub(model, name)
    assert not hub.private


def test_without_a_token_nothing_is_sent(hub, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the hub: run `hf auth login`, or set HF_TOKEN"):
        push_to_hub(model, "ann/small")
    assert not hub.private


def test_a_hub_out_of_reach_is_one_line(hub, model):
    hub.broken = OfflineModeIsEnabled("HF_HUB_OFFLINE\nis set")
    with pytest.raises(UserError, match=r"the hub is out of reach \(HF_HUB_OFFLINE is set\): try again later"):
        push_to_hub(model, "ann/small")


def test_a_file_that_cannot_be_read_is_no_fault_of_the_hub(hub, model):
    hub.broken = PermissionError(13, "Permission denied", "model.safetensors")
    with pytest.raises(PermissionError):
        push_to_hub(model, "ann/small")
