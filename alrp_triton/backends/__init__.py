"""The backends, in three families: torch operations, numba on a CPU, Triton on a GPU.

A backend is a module of each kind, whose functions :mod:`alrp_triton.stages` and :mod:`alrp_triton.dispatch` call.
Results are those of the operators that they serve (:mod:`alrp_triton.operators`), where NaN, groups and the order of
rows are defined.

* ``*_targets``: ``read(targets, num_classes, background, ignore_index, graded, count)``: positives and marks as
  ``find`` returns them (zeros in place of another number of positives than ``count``; no marks where targets stand for
  themselves); and status, int64 ``(2,)``, how many positives there are, and how many values mean nothing, or not 0.
  That of Triton takes logits and groups, too: it finds positives with their scores, to be put in order by
  ``triton_sort``
* ``*_binned``, ``*_tiled``: ``empty_tables(rows, grouped, columns)``, ``fill_tables(tables, rows, row_groups, columns,
  delta)``, ``matvec(rows, row_groups, columns, delta, tables)`` and ``rmatvec(rows, row_groups, weights, columns,
  delta, tables)``, the products with the comparison matrix and its transpose; in Triton the latter takes, and
  scales, the gradients of the positives, too (``triton_gradients``)
* ``*positives``: ``among_rows``, ``below_rows``, ``among_grades``, ``below_grades``, the positives among themselves;
  and ``terms``, what a loss makes of all sums
"""
