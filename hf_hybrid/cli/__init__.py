"""The command line: `main` parses, every verb is a module with its options (`OPTIONS`) and what it does (`run`)."""
