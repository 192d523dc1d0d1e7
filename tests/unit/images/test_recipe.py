"""remora.toml: what it may say, and how it tells where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from remora.errors import InvalidArgumentError, NotFoundError
from remora.images.recipe import load_recipe


def _write(directory: Path, text: str) -> Path:
    (directory / "remora.toml").write_text(text)
    (directory / "main.py").write_text("print('hello')\n")
    return directory


def test_all_keys_are_understood(tmp_path: Path) -> None:
    recipe = load_recipe(
        _write(
            tmp_path,
            """
            [image]
            name = "team/tool:2"
            base = "debian:bookworm"
            variant = "minbase"
            packages = ["zlib1g", "python3-minimal", "zlib1g"]
            [python]
            requirements = "requirements.txt"
            target = "/opt/packages"
            [files]
            "/srv/main.py" = "main.py"
            [run]
            entrypoint = ["python3"]
            cmd = ["/srv/main.py"]
            env = { A = "1" }
            workdir = "/srv"
            user = "nobody"
            stop_signal = "SIGINT"
            ports = ["80/tcp"]
            [labels]
            "org.example.team" = "x"
            """,
        )
    )
    assert (recipe.name, recipe.suite, recipe.variant) == ("team/tool:2", "bookworm", "minbase")
    assert recipe.packages == ("python3-minimal", "zlib1g")
    assert (recipe.requirements, recipe.target) == ("requirements.txt", "/opt/packages")
    assert dict(recipe.files) == {"/srv/main.py": "main.py"}
    assert recipe.config.entrypoint == ("python3",)
    assert dict(recipe.config.labels) == {"org.example.team": "x"}


def test_a_short_recipe_has_sensible_defaults(tmp_path: Path) -> None:
    directory = tmp_path / "My Function!"
    directory.mkdir()
    recipe = load_recipe(_write(directory, '[image]\nbase = "team/base:1"\n'))
    assert (recipe.name, recipe.base, recipe.suite, recipe.variant) == (
        "my-function:latest",
        "team/base:1",
        None,
        "minimal",
    )


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ('[image]\nbase = "scratch"\npakages = []\n', 3, r"no key 'pakages'; did you mean 'packages'\?"),
        ('[image]\nbase = "scratch"\n\n[fils]\n', 4, r"no section \[fils\]; did you mean 'files'\?"),
        ('[image]\nbase = "scratch"\n[run]\ncmd = "sh"\n', 4, r"\[run\] cmd must be a list of strings, not 'sh'"),
        ('[image]\nbase = "scratch"\n[run]\nuser = 0\n', 4, "user must be a string"),
        ('[image]\nbase = "scratch"\n[run.env]\nA = 1\n', 3, "env must be a table of strings"),
        ('[image]\nbase = "scratch"\n[run]\nworkdir = "srv"\n', 4, "not absolute"),
        ('[image]\nbase = "scratch"\nname = "Bad Name"\n', 3, "no image name"),
        ('[image]\nbase = "debian:bookworm"\nvariant = "huge"\n', 3, "allowed are minimal and minbase"),
        ('[image]\nbase = "debian:bookworm"\npackages = ["a b"]\n', 3, "'a b' is no package name"),
        ('[image]\nbase = "team/base"\npackages = ["x11"]\n', 3, "packages needs a base of packages"),
        ('[image]\nbase = "scratch"\n[files]\n"srv/x" = "main.py"\n', 4, "not absolute"),
        ('[image]\nbase = "scratch"\n[files]\n"/srv/../x" = "main.py"\n', 4, "not absolute"),
        ('[image]\nbase = "scratch"\n[files]\n"/x" = "../outside"\n', 4, "outside of"),
        ('[image]\nbase = "scratch"\n[files]\n"/x" = "absent"\n', 4, "there is no 'absent'"),
        ('[image]\nbase = "scratch"\n[python]\ntarget = "/x"\n', 4, "no requirements"),
        ('image = "x"\n', 1, "must be a section"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, line: int, complaint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"remora\.toml line {line}: .*{complaint}"):
        load_recipe(_write(tmp_path, text))


def test_a_syntax_error_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"no valid TOML.*line 2"):
        load_recipe(_write(tmp_path, "[image]\nbase = scratch\n"))


def test_a_base_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="needs a base: host, debian:SUITE"):
        load_recipe(_write(tmp_path, "[image]\n"))


def test_a_directory_without_a_recipe_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no .*remora\.toml .*docs/images\.md"):
        load_recipe(tmp_path)


def test_the_example_is_a_good_recipe() -> None:
    directory = Path(__file__).parents[3] / "examples/classify"
    assert load_recipe(directory).config.cmd == ("python3", "/srv/function.py")
