"""The evaluation job: images of all kinds, scoring, and the report that is made of it."""
