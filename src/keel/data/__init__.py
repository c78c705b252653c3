"""Data: rows into records (`records`), sources into data sets (`files`, `load`), text into tokens (`chat`),
tokens into batches (`batches`)."""
