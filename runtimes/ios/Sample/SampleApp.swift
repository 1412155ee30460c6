import Liger
import SwiftUI

/// One screen: a prompt below, the text that follows it above. Add the bundle's folder to the app as "bundle".
@main
struct SampleApp: App {
    @State private var output = ""
    @State private var prompt = ""
    @State private var session: LigerSession?

    var body: some Scene {
        WindowGroup {
            VStack {
                ScrollView { Text(output).frame(maxWidth: .infinity, alignment: .leading).textSelection(.enabled) }
                TextField("Prompt", text: $prompt).onSubmit(send).textFieldStyle(.roundedBorder)
            }
            .padding()
            .task {
                do {
                    session = try LigerSession(bundle: Bundle.main.resourceURL!.appending(path: "bundle"))
                } catch { output = "\(error)" }
            }
        }
    }

    private func send() {
        guard let session else { return }
        let text = prompt
        prompt = ""
        output += text
        Task {
            do {
                for try await token in session.complete(text) { output += token.text }
            } catch { output += "\n\(error)" }
            output += "\n\n"
        }
    }
}
