"""The evaluation suites of the papers: CLIP on up to twenty image tasks, and Flan-T5 on GLUE."""
