"""The report card: prompts with exact ground truth, and measures that each come with a ceiling and a floor."""
