"""Networks on real data, trained with torch's layers and losses and with ours."""
