"""Models on the Hugging Face hub: what is uploaded, with a card written from the run, and how it comes back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tgq_fast.io.files import write_atomic
from tgq_fast.models.card import CARD, Figures, model_card, read_run
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.hub import FILES

__all__ = ["Publishing"]


class Publishing:
    """`push_to_hub` of a model, for :class:`TGQFormerModel`."""

    config: TGQFormerConfig

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """The model's own."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        evaluation: Figures | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **_: Any,
    ) -> str:
        """Upload the model, its processor and a card to the Hugging Face hub.

        The card is written from the folder of the run that the model was loaded from (data, fields, figures); a
        README.md that lies there already is taken as it is.

        Args:
            repo_id: "name" or "owner/name"; made if it is not there.
            license: of the trained weights, such as "apache-2.0".
            evaluation: figures for the card, such as `evaluate(catalog, pool)`.
            commit_message, commit_description, private, token, revision, create_pr, tags: of huggingface_hub.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return self.upload(
                Path(folder),
                repo_id,
                license=license,
                evaluation=evaluation,
                tags=tags,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                commit_description=commit_description,
                create_pr=create_pr,
            )

    def upload(
        self,
        folder: Path,
        repo_id: str,
        *,
        license: str | None = None,
        evaluation: Figures | None = None,
        tags: list[str] | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        **options: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` wrote to a folder, and the card."""
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(library_name="tgq_fast", token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        loaded_from = getattr(self, "name_or_path", "")
        source = Path(loaded_from) if loaded_from else folder
        written = next((f / CARD for f in (folder, source) if (f / CARD).is_file()), None)
        if written is not None:
            card = written.read_bytes()
        else:
            run = read_run(source)
            made = model_card(self.config, run, name=repo, license=license, evaluation=evaluation, tags=tags)
            card = made.encode()
            write_atomic(folder / CARD, card)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in FILES]
        done = api.create_commit(
            repo,
            [*files, CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card)],
            commit_message=commit_message or "Upload model",
            revision=revision,
            **{name: value for name, value in options.items() if name in ("commit_description", "create_pr")},
        )
        return str(done.commit_url)
