"""What the site needs beside docs/: files of the repository as pages, links that leave docs/, links to the API.

MkDocs calls these functions (`hooks` in mkdocs.yml). Pages are written for GitHub: links are relative to their file.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "benchmarks/results/*.png", "colab/samples.png"]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)")
FENCED = re.compile(r"(^ *```.*?^ *```|^    .*?$)", re.DOTALL | re.MULTILINE)
NAME = re.compile(
    r"<(a|pre|h\d)\b.*?</\1>|<code>((?:ed\.|evodiff_jax\.)?)((?:\w+\.)*\w+)(\([^<]*\))?</code>", re.DOTALL
)
SOURCE = '<details class="mkdocstrings-source"'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `OUTSIDE` to the site, at their paths in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files that are not of the site lead to the repository.

    In the search guides come before the API and the changelog, and tables of figures are left out.
    """
    outside = page.file.generated_by is not None
    if page.file.src_uri.startswith(("api/", "CHANGELOG")):
        page.meta["search"] = {"boost": 0.3}
    if page.file.src_uri.startswith("benchmarks/"):
        page.meta["search"] = {"exclude": True}
        markdown = markdown.replace("<details>", '<details markdown="1">')  # its tables are Markdown
    here = page.file.src_uri if outside else f"docs/{page.file.src_uri}"

    def relinked(match: re.Match[str]) -> str:
        before, link = match.groups()
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
        uri = target.removeprefix("docs/")
        if files.get_file_from_path(uri):
            return before + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        if not (ROOT / target).exists():
            return match[0]  # MkDocs warns
        return f"{before}{config.repo_url}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}"

    parts = FENCED.split(markdown)
    return "".join(part if odd % 2 else LINK.sub(relinked, part) for odd, part in enumerate(parts))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Public names such as `ed.plan`, `grids.log_snr`, `unipc(2)` lead to the API; its source code is not searched."""
    del page, config, files

    def linked(match: re.Match[str]) -> str:
        package, name, call = match.groups()[1:]
        if not name or not (package or "." in name or call):
            return match[0]
        name = name if package or "." in name else f"solvers.{name}"
        return f'<autoref optional identifier="evodiff_jax.{name}">{match[0]}</autoref>'

    return NAME.sub(linked, html.replace(SOURCE, f"{SOURCE} data-search-exclude"))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Without this mark the theme does not ask GitHub for the number of stars."""
    del page, config
    return output.replace('data-md-component="source"', "")
