// Renders a template over conversations as Ollama does: reads {"template": TEXT, "conversations":
// [[{"role": ..., "content": ...}, ...], ...]} from standard input and writes a JSON list of
// {"text": ..., "error": ...}.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type outcome struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

// Ollama joins all system messages into .System, and neighbours of one role into one message.
func collated(messages []message) (string, []*message) {
	var systems []string
	var joined []*message
	for place := range messages {
		one := messages[place]
		if one.Role == "system" {
			systems = append(systems, one.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == one.Role && one.Role != "tool" {
			joined[last].Content += "\n\n" + one.Content
		} else {
			joined = append(joined, &one)
		}
	}
	return strings.Join(systems, "\n\n"), joined
}

func main() {
	var given struct {
		Template      string      `json:"template"`
		Conversations [][]message `json:"conversations"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	toJSON := func(value any) string {
		encoded, _ := json.Marshal(value)
		return string(encoded)
	}
	parsed := template.Must(template.New("").
		Option("missingkey=zero").
		Funcs(template.FuncMap{"json": toJSON}).
		Parse(given.Template))
	outcomes := []outcome{}
	for _, messages := range given.Conversations {
		system, joined := collated(messages)
		var text strings.Builder
		var found outcome
		err := parsed.Execute(&text, map[string]any{
			"System":     system,
			"Messages":   joined,
			"Tools":      nil,
			"Response":   "",
			"Think":      false,
			"IsThinkSet": false,
		})
		found.Text = text.String()
		if err != nil {
			found.Error = err.Error()
		}
		outcomes = append(outcomes, found)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(outcomes); err != nil {
		panic(err)
	}
}
