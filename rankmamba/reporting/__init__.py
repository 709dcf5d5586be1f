"""Records as tables and sentences, and how systems look in them. `rankmamba.results` reads records, `rankmamba.plots` draws them."""
