"""The rules of taste as functions: each takes source text or a notebook and returns a list of findings, empty when all is well.

CONTRIBUTING.md says why the rules are what they are; test_style.py applies them and shows that each of them can fail.
"""

import ast
import io
import tokenize
from collections import Counter

MODULE_LINES, FUNCTION_LINES, CLASS_LINES, TRAINER_LINES, INIT_ARGUMENTS = 300, 50, 200, 250, 16
CELLS, MARKDOWN_SHARE, WORDS_PER_LINE = range(30, 91), 0.35, 4
EXPORT_LINES, EXPORTS_IN_A_ROW, EXAMPLE_LINES, EXAMPLES_IN_A_ROW, CHECKS = 50, 2, 10, 3, 3
NOTEBOOK_BYTES = 400_000

# A call of one of these does not hand an exception on: it keeps its text or its type at most.
_ONLY_TEXT = {"str", "repr", "type", "isinstance", "print", "debug", "info", "warning", "error", "critical", "log", "warn"}

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


# Modules, their size and habits


def sizes(source):
    """Nothing too long: the module, its functions, its classes, the argument lists of its constructors."""
    lines = len(source.splitlines())
    if lines > MODULE_LINES:
        yield f"the module has {lines} lines, at most {MODULE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _Function) and _length(node) > FUNCTION_LINES:
            yield f"line {node.lineno}: {node.name}() has {_length(node)} lines, at most {FUNCTION_LINES}"
        if isinstance(node, ast.ClassDef):
            limit = TRAINER_LINES if node.name == "UNetTrainer" else CLASS_LINES
            if _length(node) > limit:
                yield f"line {node.lineno}: class {node.name} has {_length(node)} lines, at most {limit}"
        if isinstance(node, _Function) and node.name == "__init__" and len(_parameters(node)) > INIT_ARGUMENTS:
            yield f"line {node.lineno}: __init__ takes {len(_parameters(node))} arguments, at most {INIT_ARGUMENTS}"


def habits(source):
    """No star import, no print, no broad except that swallows."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            yield f"line {node.lineno}: star import from {node.module}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno}: print(); use logging, or sys.stdout.write where output is the purpose"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") and any(map(_is_broad, node.args)):
            yield f"line {node.lineno}: suppress(Exception) hides every error"
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _passes_on(node):
            yield (
                f"line {node.lineno}: broad except. Name the errors, or raise again, or log with exc_info, "
                "or hand the exception on as an object"
            )


def _length(node):
    return node.end_lineno - node.lineno + 1


def _parameters(function):
    "All parameters with their defaults as `(argument, default or None)`; `self` and `cls` are left out"
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [*zip(plain, defaults, strict=True), (a.vararg, None), *zip(a.kwonlyargs, a.kw_defaults, strict=True), (a.kwarg, None)]
    return [(arg, default) for arg, default in found if arg and arg.arg not in ("self", "cls")]


def _is_broad(kind):
    "Whether an except clause catches everything; `kind` is the expression after `except`, None for a bare one"
    if kind is None:
        return True
    parts = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(part, ast.Name) and part.id in ("Exception", "BaseException") for part in parts)


def _passes_on(handler):
    "Whether a handler raises, logs the traceback, or hands the exception object to a call, a variable or its caller"
    for node in ast.walk(handler):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            logs = isinstance(node.func, ast.Attribute) and node.func.attr == "exception"
            if logs or any(keyword.arg == "exc_info" for keyword in node.keywords):
                return True
            if ast.unparse(node.func).split(".")[-1] not in _ONLY_TEXT and any(_is_name(o, handler.name) for o in [*node.args, *(k.value for k in node.keywords)]):
                return True
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return)):
            if any(_is_name(o, handler.name) for o in getattr(node.value, "elts", [node.value])):
                return True
    return False


def _is_name(node, name):
    return name is not None and isinstance(node, ast.Name) and node.id == name


# What is public in a module is documented


def documentation(source):
    """Every public function, class and method has a docstring; every parameter and field an annotation and a docment.

    A public class answers also for the methods that it inherits from private ones of its module.

    A docment is a comment on the line on which the parameter ends, and no other parameter shares that line. The hooks of
    observers (`on_epoch_end` and the like) need a docstring only: their parameters are one contract, described once.
    """
    tree, comments = ast.parse(source), _comment_lines(source)
    classes = _public_classes(tree)
    for node in tree.body:
        if isinstance(node, _Function) and _is_public(node.name):
            yield from _function_findings(node, node.name, comments)
        if isinstance(node, ast.ClassDef) and node.name in classes:
            yield from _class_findings(node, classes[node.name], comments)


def _public_classes(tree):
    "Name -> methods to look at: the own ones of public classes, and those of private ones from which a public one inherits them"
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {}
    for name in filter(_is_public, classes):
        line, own = [name], set()
        while line:
            node = classes[line.pop(0)]
            methods = {o.name for o in node.body if isinstance(o, _Function)}
            found.setdefault(node.name, set()).update(methods - own)
            own |= methods
            line += [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    return found


def _is_public(name):
    return not name.startswith("_")


def _comment_lines(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT and len(token.string) > 3}


def _function_findings(node, name, comments):
    decorators = [ast.unparse(o) for o in node.decorator_list]
    if not ast.get_docstring(node) and not any(o.endswith((".setter", "overload")) for o in decorators):
        yield f"{name}: no docstring"
    if node.name.startswith("on_") and "." in name:
        return
    if node.returns is None and node.name != "__init__":
        yield f"{name}: no annotation of what it returns"
    parameters = _parameters(node)
    ends = Counter(_end(arg, default) for arg, default in parameters)
    for arg, default in parameters:
        if arg.annotation is None:
            yield f"{name}: parameter {arg.arg} has no annotation"
        if _end(arg, default) not in comments or ends[_end(arg, default)] > 1:
            yield f"{name}: parameter {arg.arg} has no docment on a line of its own"


def _end(arg, default):
    return default.end_lineno if default is not None else arg.end_lineno


def _class_findings(node, methods, comments):
    if not ast.get_docstring(node):
        yield f"{node.name}: no docstring"
    decorators = " ".join(ast.unparse(o) for o in [*node.decorator_list, *node.bases])
    holds_fields = any(word in decorators for word in ("dataclass", "NamedTuple", "TypedDict"))
    for item in node.body:
        if isinstance(item, _Function) and item.name not in methods:
            continue
        if isinstance(item, _Function) and item.name == "__init__":
            told = list(_function_findings(item, f"{node.name}.__init__", comments))
            yield from (o for o in told if not o.endswith("no docstring"))
        elif isinstance(item, _Function) and _is_public(item.name):
            yield from _function_findings(item, f"{node.name}.{item.name}", comments)
        elif holds_fields and isinstance(item, ast.AnnAssign) and _is_public(item.target.id) and item.end_lineno not in comments:
            yield f"{node.name}: field {item.target.id} has no docment"


# The notebook as an essay


def shape(nb):
    """The outer form of a notebook that exports a module: title, number of cells, share of prose, imports apart."""
    cells = nb.cells
    yield from title(nb)
    if not (cells and "hide" in cells[-1].directives and "nbdev_export(" in cells[-1].text):
        yield "the last cell is not `#| hide` with `import nbdev; nbdev.nbdev_export()`"
    if len(cells) not in CELLS:
        yield f"{len(cells)} cells, wanted {CELLS[0]} to {CELLS[-1]}"
    share = sum(cell.is_markdown for cell in cells) / max(1, len(cells))
    if share < MARKDOWN_SHARE:
        yield f"{share:.0%} of the cells are markdown, wanted at least {MARKDOWN_SHARE:.0%}"
    words = sum(len(cell.text.split()) for cell in cells if cell.is_markdown)
    lines = sum(len(cell.lines) for cell in cells if cell.is_export)
    if words < WORDS_PER_LINE * lines:
        yield f"{words} words for {lines} exported lines: {words / lines:.1f} a line, wanted at least {WORDS_PER_LINE}"


def title(nb):
    """Every notebook opens with a title and one line on what it is for."""
    first = nb.cells[0].text.split("\n") if nb.cells and nb.cells[0].is_markdown else [""]
    if not (first[0].startswith("# ") and any(line.startswith("> ") for line in first)):
        yield "cell 1 is not markdown with `# title` and `> one line that says what it is for`"


def stored(nb, size):
    """What is saved with a notebook: no stored error, and no more bytes than one reads over a slow line."""
    if size > NOTEBOOK_BYTES:
        yield f"the file has {size / 1000:.0f} kB, at most {NOTEBOOK_BYTES // 1000}"
    for number, cell in enumerate(nb.raw.cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            yield f"cell {number}: an error is stored in its output"


def each_cell(nb):
    """Each cell by itself: short, examples without comments, exported imports apart from exported code."""
    for cell in nb.cells:
        if cell.is_export and len(cell.lines) > EXPORT_LINES:
            yield f"cell {cell.number}: {len(cell.lines)} exported lines, at most {EXPORT_LINES}"
        if cell.is_example and len(cell.lines) > EXAMPLE_LINES:
            yield f"cell {cell.number}: an example of {len(cell.lines)} lines, at most {EXAMPLE_LINES}"
        if cell.is_example and not cell.text.lstrip().startswith("%%") and _comment_lines("\n".join(cell.lines)):
            yield f"cell {cell.number}: a comment in an example; say it in markdown"
        if cell.is_export and _mixes_imports(cell.text):
            yield f"cell {cell.number}: exported imports belong in a cell of their own"


def _mixes_imports(source):
    "Whether a cell has imports beside other code; the module's logger and a block for type checkers count as neither"
    nodes = [o for o in ast.parse(source).body if not isinstance(o, ast.If) and "getLogger(__name__)" not in ast.unparse(o)]
    return {isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes} == {True, False}


def timed(nb):
    """No check of a duration: on a busy machine it fails one day. What a thing takes is shown, and measured in `benchmarks`."""
    watches = {"perf_counter", "process_time", "timeit"}
    for cell in nb.cells:
        statements = [o for o in ast.walk(ast.parse("\n".join(cell.lines) * cell.is_example)) if isinstance(o, ast.stmt)]
        for node in sorted(statements, key=lambda o: o.lineno):
            parts = list(ast.walk(node))
            named = {o.attr if isinstance(o, ast.Attribute) else o.id for o in parts if isinstance(o, (ast.Attribute, ast.Name))}
            if isinstance(node, (ast.Assign, ast.FunctionDef)):
                held = {node.name} if isinstance(node, ast.FunctionDef) else {ast.unparse(o).split("[")[0] for o in node.targets}
                watches = watches | held if named - held & watches else watches - held
            if isinstance(node, ast.Assert) and named & watches and any(isinstance(o, ast.Compare) for o in parts):
                yield f"cell {cell.number}: asserts a duration ({', '.join(sorted(named & watches))}); show it instead"


def rows(nb):
    """No wall of code: few exported cells in a row, few examples in a row. Hidden cells are not seen and break no row."""
    length, before = 0, None
    for cell in _visible(nb):
        kind = "markdown" if cell.is_markdown else "exported" if cell.is_export else "example"
        length = length + 1 if kind == before else 1
        limit = {"exported": EXPORTS_IN_A_ROW, "example": EXAMPLES_IN_A_ROW}.get(kind, length)
        if length == limit + 1:
            yield f"cell {cell.number}: more than {limit} {kind} cells in a row"
        before = kind


def _visible(nb):
    return [cell for cell in nb.cells if cell.lines and (cell.is_markdown or cell.is_export or cell.is_example)]


def public_names(nb):
    """Public names that a notebook exports as `{name: cell}`, functions and classes first, then constants."""
    defined, constants = {}, {}
    for cell in nb.cells:
        for node in ast.parse(cell.text).body if cell.is_export and "exporti" not in cell.directives else ():
            if isinstance(node, (*_Function, ast.ClassDef)) and _is_public(node.name):
                defined[node.name] = cell
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            constants |= dict.fromkeys((o.id for o in targets if isinstance(o, ast.Name) and _is_public(o.id)), cell)
    return defined, constants


def prose(nb):
    """Markdown beside every public name: before or after its cell, or before the pair of cells if it names it."""
    defined, constants = public_names(nb)
    visible = _visible(nb)
    for name, cell in {**defined, **constants}.items():
        at = visible.index(cell)
        start = at
        while start > 0 and visible[start - 1].is_export:
            start -= 1
        beside = [o for o in visible[max(0, at - 1) : at] + visible[at + 1 : at + 2] if o.is_markdown]
        above = [o for o in visible[max(0, start - 1) : start] if o.is_markdown and name in o.text]
        if not beside + above:
            yield f"cell {cell.number}: no markdown beside {name}"


def checked(nb):
    """At least three checks for every public function and class, and one for every public constant."""
    defined, constants = public_names(nb)
    found = count_checks(nb, {*defined, *constants})
    for name in defined:
        if found[name] < CHECKS:
            yield f"cell {defined[name].number}: {found[name]} checks of {name}, wanted at least {CHECKS}"
    for name in constants:
        if not found[name]:
            yield f"cell {constants[name].number}: no check of {name}"


def count_checks(nb, public):
    """How many checks each public name has, in cells that run by default: a `Counter`.

    A check is an assert, a call of `assert_...` (as in `torch.testing`) or of a local helper that asserts. It counts for the
    public names in its expression, for those its variables were made from, and for those that the cell called for their
    effect. In a loop over a literal it counts once for each item.
    """
    counter = _CheckCounter(public)
    for cell in nb.runnable(frozenset({"slow", "cuda"}), exported=False):
        counter.effects = set()
        if not cell.text.lstrip().startswith("%"):
            counter.visit(ast.parse("\n".join(cell.lines)))
    return counter.found


class _CheckCounter(ast.NodeVisitor):
    def __init__(self, public):
        self.public, self.found, self.times = public, Counter(), 1
        self.origins, self.helpers, self.effects = {}, {}, set()

    def sources(self, *nodes):
        "The public names that expressions are made from"
        names = {o.id for node in nodes if node for o in ast.walk(node) if isinstance(o, ast.Name)}
        names |= {o.attr for node in nodes if node for o in ast.walk(node) if isinstance(o, ast.Attribute)} & self.public
        return (names & self.public).union(*(self.origins.get(name, set()) for name in names))

    def bind(self, target, *values):
        made = self.sources(*values)
        for name in {o.id for o in ast.walk(target) if isinstance(o, ast.Name)}:
            self.origins[name] = self.origins.get(name, set()) | made

    def count(self, names, times=1):
        self.found.update({name: self.times * times for name in names | self.effects})

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self.effects |= self.sources(node.value.func) & {ast.unparse(node.value.func).split(".")[-1]}
        self.generic_visit(node)

    def visit_Assert(self, node):
        self.count(self.sources(node.test))

    def visit_Assign(self, node):
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.bind(node.target, node.value)
        self.generic_visit(node)

    visit_AnnAssign = visit_NamedExpr = visit_AugAssign

    def visit_With(self, node):
        for item in node.items:
            self.effects |= self.sources(item.context_expr)
            if item.optional_vars:
                self.bind(item.optional_vars, item.context_expr)
        self.generic_visit(node)

    def visit_For(self, node):
        self.bind(node.target, node.iter)
        items = getattr(node.iter, "elts", getattr(node.iter, "keys", [None]))
        outer, self.times = self.times, self.times * max(1, len(items))
        self.generic_visit(node)
        self.times = outer

    def visit_FunctionDef(self, node):
        self.origins[node.name] = self.sources(*node.body)
        checks = [o for o in ast.walk(node) if isinstance(o, ast.Assert) or isinstance(o, ast.Raise) and "AssertionError" in ast.unparse(o)]
        if checks:
            self.helpers[node.name] = len(checks)

    def visit_ClassDef(self, node):
        self.origins[node.name] = self.sources(node)

    def visit_Call(self, node):
        name = ast.unparse(node.func).split(".")[-1]
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if name in self.helpers or name.startswith("assert_"):
            self.count(self.sources(node.func, *given), self.helpers.get(name, 1))
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            self.bind(node.func.value, *given)  # `history.append(row)` makes `history` of `row`
        self.generic_visit(node)
