"""How the documentation is built: `make docs`, which runs sphinx-build over the repository's Markdown.

The sources are where a reader of the repository finds them, so that their links lead to the same place here and there.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402

# The names that users type, such as tersetorch.prune, are attributes: autodoc imports modules.
sys.modules.update(reference.public_modules())

project = "tersetorch"
release = metadata.version("tersetorch")
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "tests/cuda_emulator/README.md"]
exclude_patterns = [".*", "build", "dist", "bench", "csrc", "python", "examples"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"tersetorch {release}"
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # what stands before the colon in Returns says shapes, not a class to look up
napoleon_custom_sections = ["Source"]

nitpicky = True
nitpick_ignore_regex = [
    # Other libraries' classes: their documentation is not asked over the network.
    ("py:.*", r"(torch|nn|numpy|np|rich|os|collections|pathlib|typing|types|functools|torchao|pydantic)(\..*)?"),
    ("py:.*", r"(Tensor|Module|dtype|device|PathLike|Path|Progress|Table|Callable|Iterable|Sequence|Mapping|Any)"),
    # Variables of types.
    ("py:class", r"tersetorch\..*\.(Dense|Format|Model|Result|Value)|Codes|Number"),
    # What pydantic checks beside the type of a field.
    ("py:class", r"Bits|Count|Epochs|Fractions?|Rounds|SharedBits"),
    ("py:class", r"Field(Info)?|(annotated_types\.)?[GL][et]|[gl][et]=\S+|NoneType"),
    # Classes inside, which users meet as results only.
    (
        "py:class",
        r"tersetorch\..*\.(CompressedWeight|ConvOptions|Decomposition|VectorCodes|WordPattern|ZeroPadded)",
    ),
]


COLON = "\N{PRESENTATION FORM FOR VERTICAL COLON}"


def plain_text(app, what, name, obj, options, lines):
    """Makes markup of a docstring that is plain text."""
    lines[:] = reference.as_markup(lines)
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(":", COLON)  # napoleon takes what stands before it for a type


def restore_colon(app, what, name, obj, options, lines):
    """Undoes what plain_text has hidden from napoleon."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def mend_links(app, doctree):
    """Links to folders, which have no page here, become plain; names in pages become links.

    `tt.prune.magnitude(...)` leads to its entry in the reference; one that has none is a warning, so an error.
    """
    folder = (ROOT / app.env.docname).parent
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link.get("reftype") == "myst" and (folder / link["reftarget"]).is_dir():
            link.replace_self(link.children)
    for literal in list(doctree.findall(nodes.literal)):
        name = re.match(r"tt((?:\.\w+)+)(?:\(|$)", literal.astext())
        if name is None or isinstance(literal.parent, nodes.reference | addnodes.pending_xref):
            continue
        target = "tersetorch" + name[1]
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=True, refdoc=app.env.docname
        )
        literal.replace_self(link)
        link += literal


def resolve(app, env, node, contnode):
    """Classes under the names of the files that define them, which annotations have."""
    target = node.get("reftarget", "")
    objects = env.get_domain("py").objects
    found = objects.get(reference.public_names().get(target, "")) or objects.get(target)
    if node.get("refdomain") != "py" or found is None:
        return None
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode)


def start_page(app, error):
    """The site's address leads to its first page, which lies where the repository has it."""
    if error is None and app.builder.format == "html":
        page = f"{app.config.root_doc}.html"
        (Path(app.outdir) / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={page}">\n')


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", lambda app: reference.write_pages(HERE / "api"))
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon makes markup of it
    app.connect("autodoc-process-docstring", restore_colon, priority=600)
    app.connect("doctree-read", mend_links)
    app.connect("missing-reference", resolve)
    app.connect("build-finished", start_page)
