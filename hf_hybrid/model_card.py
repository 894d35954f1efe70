def write_model_card(model, folder): pass
