"""What runs at each SuperNode: Flower's own quickstart, and two changed lines."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from choral.network.flower import secure_sum_mod  # new

app = ClientApp(mods=[secure_sum_mod])  # was ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    from visits import task  # which takes torch: a message that asks for no training goes without

    model, dataset = task.new_model(), task.load(path_of_data(context))
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loss = task.train(model, dataset, msg.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


def path_of_data(context: Context) -> str:
    """By the node's own configuration; in a simulation, where nodes have none, by the number of its part."""
    own = context.node_config.get("data")
    return str(own or context.run_config["data"].format_map(context.node_config))
