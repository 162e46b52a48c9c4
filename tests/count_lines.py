"""How plain the three scripts are, by the measures of the house style; prints a Markdown table.

    uv run tests/count_lines.py [COMMIT]     COMMIT: of a state to compare with

Branches of a function: if, for, while, except, case, a ternary, a comprehension's loop and filters, and each operand of
`and` and `or` after the first; functions inside it count as their own. Comment lines hold nothing but a comment.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("prepare.py", "train.py", "analyze.py")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.match_case, ast.IfExp)
TITLES = ("lines", "functions", "branches, 95th percentile", "most", "over 12", "comment lines",
          "ternaries / 100 lines", "comprehensions / 100 lines", "over 100 columns")


def count_branches(node: ast.AST) -> int:
    total = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        total += isinstance(child, BRANCHES)
        if isinstance(child, ast.comprehension):
            total += 1 + len(child.ifs)
        if isinstance(child, ast.BoolOp):
            total += len(child.values) - 1
        total += count_branches(child)
    return total


def measure(text: str) -> list[str]:
    tree, lines = ast.parse(text), text.splitlines()
    branches = [count_branches(node) for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = sum(t.type == tokenize.COMMENT and t.line.strip().startswith("#") for t in tokens)
    nodes = list(ast.walk(tree))
    ternaries = sum(isinstance(node, ast.IfExp) for node in nodes)
    comprehensions = sum(isinstance(node, ast.comprehension) for node in nodes)
    hundred = len(lines) / 100
    return [
        str(len(lines)),
        str(len(branches)),
        f"{np.percentile(branches, 95):.0f}",
        str(max(branches)),
        f"{np.mean(np.array(branches) > 12):.1%}",
        f"{comments / len(lines):.1%}",
        f"{ternaries / hundred:.1f}",
        f"{comprehensions / hundred:.1f}",
        f"{np.mean([len(line) > 100 for line in lines]):.1%}",
    ]


def main() -> None:
    print("| script | " + " | ".join(TITLES) + " |\n" + "|---" * (1 + len(TITLES)) + "|")
    for script in SCRIPTS:
        for commit in sys.argv[1:2]:
            command = ["git", "-C", str(ROOT), "show", f"{commit}:{script}"]
            before = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"| {script} at {commit} | " + " | ".join(measure(before)) + " |")
        print(f"| {script} | " + " | ".join(measure((ROOT / script).read_text())) + " |")


if __name__ == "__main__":
    main()
