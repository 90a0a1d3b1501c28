"""Floor 7: `jora compare`, methods on equal terms: same data, budget and seeds, and a table and plots of what came out.

plan.py    what to compare: a YAML file like a `jora train` config, with `seeds` and `methods`
worker.py  one training with its evaluation, in a process of its own
run.py     all of them, finished ones skipped
table.py   means and spreads; CSV and Markdown
plots.py   the drawings (matplotlib, the extra `compare`)
page.py    index.html
"""
